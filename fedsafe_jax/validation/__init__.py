"""Checks of a config before any compute, and the errors of wrong input.

`validate` checks the config of a run, `validate_filter` that of a filter; every message names a
field. `ranges` holds the numbers that fields may have, `errors` the exceptions that are printed
as one line.
"""

from fedsafe_jax.validation.checks import choices, validate, validate_filter
from fedsafe_jax.validation.errors import input_errors, one_line, storage_errors

__all__ = [
    "choices",
    "input_errors",
    "one_line",
    "storage_errors",
    "validate",
    "validate_filter",
]
