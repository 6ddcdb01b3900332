"""Ranking quality: how well a score finds what is to be found, with its interval.

The area under the ROC curve (AUROC) is the chance that a positive item scores higher than a
negative one, ties counting half. Positive items are few where they are malicious clients, and
often all of them come first: a bootstrap then gives an interval of width zero. So the interval is
Newcombe's (Statistics in Medicine, 2006, 25:559-573, method 5), which is to the variance of Hanley
and McNeil (Radiology, 1982) what Wilson's is to that of a proportion: the areas from which the one
that was measured is no more than 1.96 of their own standard errors away.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

from fedsafe_jax.evals import statistics
from fedsafe_jax.filters.quality import auroc

NEXT = 1e-9  # from the area that was measured, where its own root is left out
Counts = Sequence[tuple[int, int]]  # positive and negative items of each seed


class Ranking(NamedTuple):
    """The quality of a score over seeds, each with items of its own.

    Attributes:
      auroc: mean over the seeds that have items of both kinds, in [0, 1]; None without any.
      ci95: its 95% interval.
      per_seed: area of each seed; None where one kind is missing.
    """

    auroc: float | None
    ci95: list[float | None]
    per_seed: list[float | None]


def ranking(positive: Sequence[Sequence[bool]], scores: Sequence[Sequence[float]]) -> Ranking:
    """Measures how well scores rank positive items first.

    With several seeds the distances to the bounds are `sqrt(items^2 + seeds^2)`, as of all rates:
    the items' part is Newcombe's, the seeds' Student's t.

    Args:
      positive: labels of each seed's items.
      scores: their scores, the higher the more likely positive.
    """
    per_seed = [auroc(own, s) for own, s in zip(positive, scores, strict=True)]
    areas = [area for area in per_seed if area is not None]
    if not areas:
        return Ranking(None, [None, None], per_seed)
    counts = [
        (int(np.sum(own)), len(own) - int(np.sum(own)))
        for own, area in zip(positive, per_seed, strict=True)
        if area is not None
    ]
    middle = float(np.mean(areas))
    half_width = statistics.seeds_half_width(np.array(areas)[:, None])
    low, high = statistics.widened(middle, *interval(middle, counts), half_width)
    return Ranking(middle, [max(low, 0.0), min(high, 1.0)], per_seed)


def interval(area: float, counts: Counts) -> tuple[float, float]:
    """Returns Newcombe's 95% interval of an AUROC, or of the mean over independent seeds.

    Args:
      area: the area measured, in [0, 1].
      counts: positive and negative items of each seed, at least one of both.
    """
    # Areas and counts may be turned around together, and the variance counts both kinds alike.
    return _lower(area, counts), 1 - _lower(1 - area, counts)


def _lower(area: float, counts: Counts) -> float:
    z = stats.norm.ppf((1 + statistics.LEVEL) / 2)

    def beyond(truth):
        return (area - truth) ** 2 - z**2 * _variance(truth, counts)

    nearest = area - NEXT
    if nearest <= 0 or beyond(nearest) >= 0:
        return max(area, 0.0)
    return float(optimize.brentq(beyond, 0.0, nearest))


def _variance(area: float, counts: Counts) -> float:
    """Returns the variance of the mean AUROC, each seed's with `(positive + negative) / 2` in the
    place of either count, but for the pairs that it is divided by."""
    total = 0.0
    for positive, negative in counts:
        others = (positive + negative) / 2 - 1
        shared = (1 - area) / (2 - area) + area / (1 + area)
        total += area * (1 - area) * (1 + others * shared) / (positive * negative)
    return total / len(counts) ** 2
