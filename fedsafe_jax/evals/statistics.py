"""Intervals of rates and means over items and seeds, and paired differences between two models.

Values are `[seeds, items]`, the same items in every row; one that is not finite is not there. With
several seeds both sources of variation count: seeds are few, so their part of an interval takes
Student's t; items are many, so theirs is Wilson's or the bootstrap's.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from fedsafe_jax.random_streams import Purpose, generator

RESAMPLES = 2000
LEVEL = 0.95


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Returns Wilson's 95% score interval of a proportion, in [0, 1]; honest at 0% and 100% too."""
    if n == 0:
        return 0.0, 1.0
    bounds = stats.binomtest(successes, n).proportion_ci(LEVEL, method="wilson")
    p = successes / n
    # Rounding must not put the proportion itself outside.
    return min(p, max(0.0, float(bounds.low))), max(p, min(1.0, float(bounds.high)))


def bootstrap(values: ArrayLike) -> tuple[float, float]:
    """Returns the 95% interval of the mean of values `[items]`, by the bootstrap.

    It is bias-corrected and accelerated (Efron, 1987): losses of answers are skewed. Its distances
    from the mean are lengthened as Student's t lengthens the normal's: resamples of few items vary
    too little. Values that are all the same give an interval of width zero.
    """
    values = np.asarray(values, np.float64)
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    bounds = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        rng=generator(Purpose.BOOTSTRAP, 0),
    ).confidence_interval
    if not np.isfinite(bounds).all():  # as for values that differ by rounding alone
        return float(values.min()), float(values.max())
    n, middle = len(values), float(values.mean())
    quantiles = stats.t.ppf((1 + LEVEL) / 2, n - 1) / stats.norm.ppf((1 + LEVEL) / 2)
    longer = float(quantiles * math.sqrt(n / (n - 1)))
    return middle - longer * (middle - bounds.low), middle + longer * (bounds.high - middle)


def changes(values: np.ndarray) -> tuple[float, float]:
    """Returns the 95% interval of the mean of changes `[items]`, each from -1 to 1.

    It is the normal interval with one more item that rose and one that fell (Bonett and Price,
    2012, for paired proportions): where few items differ, the bootstrap never draws what was not
    seen, and an interval of one change ends at 0.
    """
    both = np.append(values, [1.0, -1.0])
    half = stats.norm.ppf((1 + LEVEL) / 2) * both.std() / math.sqrt(len(both))
    return max(-1.0, float(both.mean() - half)), min(1.0, float(both.mean() + half))


def seeds_half_width(values: np.ndarray) -> float:
    """Returns half the 95% interval of the mean over seeds by Student's t, for float `[seeds,
    items]`; 0 for one seed, which says nothing of the spread between runs."""
    seeds = len(values)
    if seeds < 2:
        return 0.0
    t = stats.t.ppf((1 + LEVEL) / 2, seeds - 1)
    return float(t * values.mean(axis=1).std(ddof=1) / math.sqrt(seeds))


def rate(values: ArrayLike) -> tuple[float | None, list[float | None]]:
    """Returns a rate and its 95% interval, in percent.

    The distances from the rate to the bounds are `sqrt(items^2 + seeds^2)`: the part of the items
    is Wilson's, that of the seeds Student's t. In simulations with two to five seeds the interval
    covers the true rate in 95% or more; the bootstrap over three seeds covers it in 76 to 87% where
    seeds differ. With one seed it is that of the items alone.

    Args:
      values: `[seeds, items]`, bool or from 0 to 1; items without a value in every seed are left
        out. (Of all such values with one mean, zeros and ones vary most.)

    Returns:
      `(rate, [low, high])`; None in each place where no item is left.
    """
    values = complete(values)
    if not values.size:
        return None, [None, None]
    middle = float(values.mean())
    low, high = widened(middle, *wilson_of_mean(middle, values.shape[1]), seeds_half_width(values))
    return 100 * middle, [100 * max(low, 0.0), 100 * min(high, 1.0)]


def mean(values: ArrayLike) -> tuple[float | None, list[float | None]]:
    """Returns a mean and its 95% interval; as `rate`, but the items' part is the bootstrap's.

    Args:
      values: float `[seeds, items]`; items without a value in every seed are left out.
    """
    values = complete(values)
    if not values.size:
        return None, [None, None]
    middle = float(values.mean())
    bounds = bootstrap(values.mean(axis=0))
    return middle, list(widened(middle, *bounds, seeds_half_width(values)))


def wilson_of_mean(middle: float, items: int) -> tuple[float, float]:
    """Returns Wilson's interval of a rate over `items`, whose mean over seeds may lie between two
    counts: that of the nearest count, moved to the mean."""
    count = round(middle * items)
    low, high = wilson(count, items)
    shift = middle - count / items
    return max(0.0, low + shift), min(1.0, high + shift)


def widened(middle: float, low: float, high: float, half_width: float) -> tuple[float, float]:
    """Returns the interval whose distances from its middle are those given and `half_width`, added
    as independent errors are."""
    below, above = math.hypot(middle - low, half_width), math.hypot(high - middle, half_width)
    return middle - below, middle + above


def complete(values: ArrayLike) -> np.ndarray:
    """Returns float64 `[seeds, items]` with the items alone that have a value in every seed."""
    values = np.atleast_2d(np.asarray(values, np.float64))  # None becomes NaN
    # Row by row in memory, so that a row's sum is the one that it has alone.
    return np.ascontiguousarray(values[:, np.isfinite(values).all(axis=0)])


def means_by_seed(values: ArrayLike) -> list[float | None]:
    """Returns each seed's mean over the items that have a value in every seed; None without any."""
    return [float(row.mean()) if row.size else None for row in complete(values)]


class Difference(NamedTuple):
    """A paired difference between two models over the same items and seeds.

    Attributes:
      difference: mean of ours less the reference's; None where no item is left.
      ci95: its 95% interval.
      n: items that count.
      per_seed: the difference of each seed.
      p: exact p-value, two-sided, that ours is neither better nor worse; None for figures that are
        no rates. For one seed it is McNemar's test, of the items that differ; for several the same
        test of the items that differ over all seeds together. It treats the seeds as given.
      more, fewer: items that are higher, and lower, in ours; None for figures that are no rates.
    """

    difference: float | None
    ci95: list[float | None]
    n: int
    per_seed: list[float]
    p: float | None = None
    more: int | None = None
    fewer: int | None = None


def paired(ours: ArrayLike, reference: ArrayLike, rates: bool = True) -> Difference:
    """Compares two models on the same items.

    Both answer the same prompts, so the interval of the difference is much narrower than those of
    the two figures. Over the items it is the bootstrap's, or for rates that of `changes`; over the
    seeds Student's t, as in `mean`. Rates that differ on no item get Wilson's bound on a rate of 0.

    Args:
      ours, reference: `[seeds, items]`, the same items and seeds in both.
      rates: whether the values are bool or from 0 to 1, and the difference is to be in percentage
        points, with the exact test.
    """
    sides = [np.atleast_2d(np.asarray(side, np.float64)) for side in (ours, reference)]
    with np.errstate(invalid="ignore"):  # two infinities are no number, and left out as they are
        gaps = complete(sides[0] - sides[1])
    if not gaps.size:
        return Difference(None, [None, None], n=0, per_seed=[])
    scale, by_item, middle = 100.0 if rates else 1.0, gaps.mean(axis=0), float(gaps.mean())
    if rates and not by_item.any():
        low, high = -wilson(0, gaps.shape[1])[1], wilson(0, gaps.shape[1])[1]
    else:
        low, high = changes(by_item) if rates else bootstrap(by_item)
    low, high = widened(middle, low, high, seeds_half_width(gaps))
    if rates:
        low, high = max(-1.0, low), min(1.0, high)
    gap = Difference(
        scale * middle,
        [scale * low, scale * high],
        n=gaps.shape[1],
        per_seed=(scale * gaps.mean(axis=1)).tolist(),
    )
    if not rates:
        return gap
    more, fewer = int((by_item > 0).sum()), int((by_item < 0).sum())
    p = float(stats.binomtest(more, more + fewer).pvalue) if more + fewer else 1.0
    return gap._replace(p=p, more=more, fewer=fewer)
