"""Rates by group, such as category, attack or language: each one's, their mean, and what n shows.

The micro average of a task is the rate over all of its items; the macro average counts every group
alike.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, stats

from fedsafe_jax.evals import statistics

POWER = 0.8


def smallest_difference(rate: float, n: int) -> float:
    """Returns the smallest difference between two rates that n items each show with 80% power.

    The test is that of two proportions, two-sided at 5%, on independent answers. With p the mean
    of both rates, the difference d solves (Fleiss, 1981, chapter 3)

        sqrt(n) d = z_0.975 sqrt(2 p (1 - p)) + z_0.8 sqrt(p_1 (1 - p_1) + p_2 (1 - p_2)),

    which asks for too much, rather than too little, near 0 and 1. Arms that answer the same items
    are compared item by item, which may show less.

    Args:
      rate: the rate that is compared with, from 0 to 1.
      n: items of each side; at least 1.

    Returns:
      The larger of the differences above and below that can be, from 0 to 1; 1 where n is too
      small to show any.
    """
    level, power = stats.norm.ppf([(1 + statistics.LEVEL) / 2, POWER])

    def missing(gap: float, sign: int) -> float:
        other = rate + sign * gap
        middle = (rate + other) / 2
        spread = level * math.sqrt(2 * middle * (1 - middle))
        spread += power * math.sqrt(max(rate * (1 - rate) + other * (1 - other), 0.0))
        return spread - math.sqrt(n) * gap

    shown = [
        float(optimize.brentq(missing, 1e-9, room, args=(sign,)))
        for sign, room in ((-1, rate), (1, 1 - rate))
        if room > 1e-9 and missing(room, sign) < 0
    ]
    return max(shown, default=1.0)


def rates(values: ArrayLike, names: Sequence[str], field: str) -> dict[str, dict]:
    """Returns the rate of each group, in percent.

    Args:
      values: `[seeds, items]`, as `statistics.rate` takes them.
      names: group of each item; "" for an item that is in none.
      field: name of the rate in the result.

    Returns:
      `{group: {field, "ci95", "n", "smallest_difference"}}` by name of the group; the last is in
      points, None where no item counts.
    """
    return {name: _rate(chosen, field) for name, chosen in _split(values, names).items()}


def _rate(values: np.ndarray, field: str) -> dict:
    mean, interval = statistics.rate(values)
    n = statistics.complete(values).shape[1]
    shown = None if mean is None else 100 * smallest_difference(mean / 100, n)
    return {field: mean, "ci95": interval, "n": n, "smallest_difference": shown}


def macro(values: ArrayLike, names: Sequence[str]) -> tuple[float | None, list[float | None]]:
    """Returns the mean of the groups' rates and its 95% interval, in percent.

    The items' part joins the groups' Wilson intervals as those of independent rates (Zou and
    Donner, 2008); the seeds' part is Student's t, as in `statistics.rate`.

    Args:
      values: `[seeds, items]`, as `statistics.rate` takes them.
      names: group of each item; "" for an item that is in none.

    Returns:
      `(rate, [low, high])` over the groups in which an item counts; None without any.
    """
    parts = [statistics.complete(part) for part in _split(values, names).values()]
    parts = [part for part in parts if part.size]
    if not parts:
        return None, [None, None]
    by_seed = np.stack([part.mean(axis=1) for part in parts], axis=1)  # [seeds, groups]
    means, middle = by_seed.mean(axis=0), float(by_seed.mean())
    bounds = [
        statistics.wilson_of_mean(float(mean), part.shape[1])
        for mean, part in zip(means, parts, strict=True)
    ]
    below, above = (math.hypot(*(means - side)) / len(parts) for side in np.transpose(bounds))
    low, high = statistics.widened(
        middle, middle - below, middle + above, statistics.seeds_half_width(by_seed)
    )
    return 100 * middle, [100 * max(low, 0.0), 100 * min(high, 1.0)]


def _split(values: ArrayLike, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns the values of each named group, float64 `[seeds, items of the group]`."""
    values = np.atleast_2d(np.asarray(values, np.float64))
    labels = np.asarray(names)
    return {name: values[:, labels == name] for name in sorted(set(names) - {""})}
