"""Intervals for rates and means."""

import math

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 2000


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Returns Wilson's 95% score interval of a proportion, in [0, 1]; honest at 0% and 100% too."""
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # Rounding must not put the proportion itself outside.
    return min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half))


def bootstrap(values: ArrayLike, seed: int = 0) -> tuple[float, float]:
    """Returns the 95% percentile interval of the mean, by the bootstrap.

    Args:
      values: `[seeds, items]`, the same items in every row. Items are resampled together for all
        seeds, since answers to one prompt are not independent across seeds; with more than one
        seed, seeds are resampled too, so the interval covers both sources of variation.
      seed: seed of the resampling.
    """
    values = np.atleast_2d(np.asarray(values, np.float64))
    rng = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        rows = rng.integers(len(values), size=len(values))
        columns = rng.integers(values.shape[1], size=values.shape[1])
        means[i] = values[rows][:, columns].mean()
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def summarise(values: ArrayLike, scale: float = 100.0) -> tuple[float, list[float]]:
    """Returns mean and 95% interval of `[seeds, items]`, times `scale`.

    One seed of zeros and ones takes Wilson's interval. For several seeds the bootstrap is widened
    to Wilson's over the items, so that unanimous answers do not give an interval of width zero.
    """
    values = np.atleast_2d(np.asarray(values, np.float64))
    mean = float(values.mean())
    binary = bool(np.isin(values, (0.0, 1.0)).all())
    if binary and len(values) == 1:
        low, high = wilson(int(values.sum()), values.size)
    else:
        low, high = bootstrap(values)
        if binary:
            floor, ceiling = wilson(round(mean * values.shape[1]), values.shape[1])
            low, high = min(low, floor), max(high, ceiling)
    return scale * mean, [scale * low, scale * high]
