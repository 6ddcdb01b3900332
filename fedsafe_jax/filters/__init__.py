"""Safety filters of the clients: what they score, how they decide, what is done with a pair.

The kinds of filters are in `kinds`, their training in `classifier` and `guard`.
"""

from fedsafe_jax.filters.actions import (
    ACTIONS,
    Action,
    FilterCounts,
    FilteredPairs,
    NewAnswer,
    Treated,
    apply,
)
from fedsafe_jax.filters.decision import Decision, calibrate, choose_threshold, fit
from fedsafe_jax.filters.protocol import FilterError, SafetyFilter, answer_risk

__all__ = [
    "ACTIONS",
    "Action",
    "Decision",
    "FilterCounts",
    "FilterError",
    "FilteredPairs",
    "NewAnswer",
    "SafetyFilter",
    "Treated",
    "answer_risk",
    "apply",
    "calibrate",
    "choose_threshold",
    "fit",
]
