"""Checks of a config before any compute, and the errors of wrong input.

`validate` checks the config of a run, `validate_filter` that of a filter; every message names a
field. `ranges` holds the numbers that fields may have, which `fields` checks; `errors` the
exceptions that are printed as one line.
"""

from fedsafe_jax.validation.checks import validate, validate_filter
from fedsafe_jax.validation.errors import input_errors, one_line, storage_errors
from fedsafe_jax.validation.fields import choices

__all__ = [
    "choices",
    "input_errors",
    "one_line",
    "storage_errors",
    "validate",
    "validate_filter",
]
