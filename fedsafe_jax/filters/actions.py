"""What a client does with the filter's verdict."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedsafe_jax.data.sources import UNSAFE, Example
from fedsafe_jax.filters.classifier import SafetyFilter, unsafe_probability


class FilterCounts(NamedTuple):
    """One client's filtering; the unsafe counts are known in simulation only."""

    kept: int
    dropped: int
    unsafe_kept: int
    unsafe_dropped: int


def drop(safety_filter: SafetyFilter, examples: Sequence[Example]):
    """Drops the pairs that the filter calls unsafe (the paper's action).

    Returns:
      `(kept examples, flagged bool [n], FilterCounts)`.
    """
    flagged = unsafe_probability(safety_filter, examples) >= safety_filter.threshold
    unsafe = np.array([e.label == UNSAFE for e in examples], bool)
    kept = [e for e, flag in zip(examples, flagged, strict=True) if not flag]
    counts = FilterCounts(
        len(kept), int(flagged.sum()), int((unsafe & ~flagged).sum()), int((unsafe & flagged).sum())
    )
    return kept, flagged, counts
