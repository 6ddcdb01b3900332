"""The area under the ROC curve by pairs, and its interval against its equation and the truth."""

import numpy as np
import pytest
from scipy import stats

from fedsafe_jax.evals import ranking, statistics


def hanley_mcneil(area, positive, negative):
    """The variance of 1982, Equation 2, with counts of Newcombe's method 5 but for the pairs."""
    one, two = area / (2 - area), 2 * area**2 / (1 + area)
    others = (positive + negative) / 2 - 1
    spread = area * (1 - area) + others * (one - area**2) + others * (two - area**2)
    return spread / (positive * negative)


@pytest.mark.parametrize("counts", [(3, 5), (2, 40)])
@pytest.mark.parametrize("area", [0.1, 0.5, 0.8])
def test_bounds_are_196_of_their_own_errors_away(area, counts):
    low, high = ranking.interval(area, [counts])
    assert 0 < low < area < high < 1
    for bound in (low, high):
        error = np.sqrt(hanley_mcneil(bound, *counts))
        assert abs(area - bound) / error == pytest.approx(stats.norm.ppf(0.975), rel=1e-6)


def test_all_or_none_first_is_not_certain_and_seeds_sharpen():
    low, high = ranking.interval(1.0, [(2, 8)])
    assert 0.4 < low < 0.7 and high == 1.0
    assert ranking.interval(0.0, [(2, 8)]) == pytest.approx((0.0, 1 - low))
    sharper, _ = ranking.interval(1.0, [(2, 8)] * 3)
    assert low < sharper < 1
    assert ranking.interval(0.5, [(2, 8)]) == pytest.approx(ranking.interval(0.5, [(8, 2)]))


@pytest.mark.parametrize("apart", [0.0, 1.0, 3.0])
def test_intervals_cover_the_truth(apart):
    """Few positive items, as malicious clients are; normal scores, whose area is known."""
    rng, runs, counts = np.random.default_rng(0), 400, (4, 12)
    truth, covered = stats.norm.cdf(apart / np.sqrt(2)), 0
    labels = np.arange(sum(counts)) < counts[0]
    for _ in range(runs):
        scores = rng.standard_normal(len(labels)) + apart * labels
        low, high = ranking.ranking([labels], [scores]).ci95
        covered += low <= truth <= high
    # Three standard errors of the share of 400 runs below 95%.
    assert covered / runs > 0.95 - 3 * (0.95 * 0.05 / runs) ** 0.5


def test_seeds_are_averaged_and_those_of_one_kind_left_out():
    labels = [[True, False, False], [False, False], [True, True, False]]
    measured = ranking.ranking(labels, [[2.0, 1.0, 2.0], [1.0, 2.0], [1.0, 3.0, 2.0]])
    assert measured.per_seed == [0.75, None, 0.5] and measured.auroc == 0.625
    items = ranking.interval(0.625, [(1, 2), (2, 1)])
    half = stats.t.ppf(0.975, 1) * np.std([0.75, 0.5], ddof=1) / np.sqrt(2)
    wanted = statistics.widened(0.625, *items, half)
    assert measured.ci95 == [max(wanted[0], 0.0), min(wanted[1], 1.0)]
    assert ranking.ranking([[True]], [[1.0]]) == (None, [None, None], [None])
