"""What the fuzzing tests share: how many inputs, and what a refusal looks like."""

import os

from hypothesis import HealthCheck, settings

from fedsafe_jax.config import ConfigError
from fedsafe_jax.validation import input_errors, one_line

# 25 inputs a test by default, more than 100 in all; with 500 they are more than 2,000.
EXAMPLES = int(os.environ.get("FEDSAFE_FUZZ_EXAMPLES", "25"))
fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES <= 25,  # a short run finds the same everywhere
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
REFUSALS = (ConfigError, *input_errors())


def refused(error: Exception) -> None:
    """Asserts that an error is one line that says something."""
    assert isinstance(error, REFUSALS)
    message = one_line(error)
    assert len(message) > 10 and message.isprintable() and len(message) < 1000, message
