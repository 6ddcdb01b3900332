"""The contract of an evaluation."""

import numpy as np

SUBSET_SEED = 2025  # the evaluation sets are the same for every seed of a run


def subset(items: list, count: int) -> list:
    """Returns at most `count` items (0: all), drawn by a fixed seed and kept in order."""
    if not count or len(items) <= count:
        return items
    order = np.random.default_rng(SUBSET_SEED).permutation(len(items))[:count]
    return [items[i] for i in sorted(order)]
