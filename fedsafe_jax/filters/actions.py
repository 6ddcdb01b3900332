"""What a client does with the filter's verdict."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fedsafe_jax.data.sources import UNSAFE, Example


class FilterCounts(NamedTuple):
    """One client's filtering; the unsafe counts are known in simulation only."""

    kept: int
    dropped: int
    unsafe_kept: int
    unsafe_dropped: int


def drop(unsafe_probability: Callable, threshold: float, examples: Sequence[Example]):
    """Drops the pairs that the filter calls unsafe (the paper's action).

    Args:
      unsafe_probability: `examples -> float [n]`, of a classifier or a guard.
      threshold: probability from which a pair is dropped.
      examples: one client's pairs.

    Returns:
      `(kept examples, flagged bool [n], FilterCounts)`.
    """
    flagged = np.asarray(unsafe_probability(examples)) >= threshold
    unsafe = np.array([e.label == UNSAFE for e in examples], bool)
    kept = [e for e, flag in zip(examples, flagged, strict=True) if not flag]
    counts = FilterCounts(
        len(kept), int(flagged.sum()), int((unsafe & ~flagged).sum()), int((unsafe & flagged).sum())
    )
    return kept, flagged, counts
