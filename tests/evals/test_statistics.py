"""Intervals against known values and simulated truths; paired differences against scipy."""

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit

from fedsafe_jax.evals import TASKS, Column, EvalOptions, comparison, statistics
from fedsafe_jax.evals.task import select


def test_wilson_interval_of_known_cases():
    # Brown, Cai and DasGupta (2001): x=0, n=10 gives [0, 0.2775]; x=5 gives [0.2366, 0.7634].
    np.testing.assert_allclose(statistics.wilson(0, 10), (0, 0.2775), atol=1e-4)
    np.testing.assert_allclose(statistics.wilson(5, 10), (0.2366, 0.7634), atol=1e-4)


def test_bootstrap_is_the_normal_interval_for_many_items():
    values = np.random.default_rng(0).normal(2.0, 1.0, 4000)
    low, high = statistics.bootstrap(values)
    # Standard error 0.0158; 2,000 resamples place a percentile to about 5% of it.
    np.testing.assert_allclose(
        (low, high), values.mean() + np.array([-1.96, 1.96]) / 4000**0.5, atol=4e-3
    )


def test_one_seed_of_a_rate_is_wilsons_interval():
    found, interval = statistics.rate([[True, False, True, True]])
    assert found == 75.0
    np.testing.assert_allclose(interval, 100 * np.array(statistics.wilson(3, 4)))


def test_seeds_take_students_t():
    """Items without any variation leave the textbook interval over the seeds."""
    means = np.array([2.0, 3.0, 7.0])
    found, interval = statistics.mean(np.tile(means[:, None], (1, 5)))
    low, high = stats.t.interval(0.95, 2, loc=4.0, scale=stats.sem(means))
    assert found == 4.0
    np.testing.assert_allclose(interval, (low, high))


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("spread", [0.0, 0.3, 0.8])  # of the seeds, in logits
def test_intervals_of_rates_cover_the_truth(seeds, spread):
    rng, items, runs = np.random.default_rng(0), 200, 400
    draws = rng.standard_normal((200_000, 2)) @ np.diag([spread, 3.0])
    truth = 100 * expit(0.5 + draws.sum(1)).mean()
    covered = 0
    for _ in range(runs):
        logits = spread * rng.standard_normal((seeds, 1)) + 3.0 * rng.standard_normal((1, items))
        low, high = statistics.rate(rng.random((seeds, items)) < expit(0.5 + logits))[1]
        covered += low <= truth <= high
    # Three standard errors of the share of 400 runs below 95%.
    assert covered / runs > 0.95 - 3 * (0.95 * 0.05 / runs) ** 0.5


@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_intervals_of_differences_cover_the_truth(spread):
    """Three seeds; the two models' answers to an item are alike, so the difference is sharp."""
    rng, items, runs = np.random.default_rng(0), 100, 150
    covered, widths, marginal = 0, [], []
    for _ in range(runs):
        shared = rng.standard_normal((1, items)) + spread * rng.standard_normal((3, 1))
        ours = shared + 0.1 + 0.2 * rng.standard_normal((3, items))
        reference = shared + 0.2 * rng.standard_normal((3, items))
        low, high = statistics.paired(ours, reference, rates=False).ci95
        covered += low <= 0.1 <= high
        widths.append(high - low)
        marginal.append(np.ptp(statistics.mean(ours)[1]))
    assert covered / runs > 0.95 - 3 * (0.95 * 0.05 / runs) ** 0.5
    assert np.median(widths) < np.median(marginal) / 2


@pytest.mark.parametrize("items", [20, 100])
def test_intervals_of_differences_of_rates_near_100_cover_the_truth(items):
    """Few items differ there, and the bootstrap's interval of one change ended at 0: at 20 items
    it covered the truth in 78%."""
    rng, runs, covered = np.random.default_rng(0), 400, 0
    for _ in range(runs):
        hard = rng.beta(4 * 0.97, 4 * 0.03, items)
        ours, reference = rng.random((1, items)) < 0.98 * hard, rng.random((1, items)) < hard
        low, high = statistics.paired(ours, reference).ci95
        covered += low <= -100 * 0.02 * 0.97 <= high
    assert covered / runs > 0.95 - 3 * (0.95 * 0.05 / runs) ** 0.5


@pytest.mark.parametrize("items", [8, 20])
def test_intervals_of_means_of_few_items_cover_the_truth(items):
    """Resamples of few items vary too little: without Student's t 88 and 91%."""
    rng, runs = np.random.default_rng(0), 400
    covered = 0
    for values in rng.standard_normal((runs, 1, items)):
        low, high = statistics.mean(values)[1]
        covered += low <= 0 <= high
    assert covered / runs > 0.95 - 3 * (0.95 * 0.05 / runs) ** 0.5


def test_an_interval_is_finite_where_values_differ_by_rounding():
    values = 1 + 1e-16 * np.arange(5)
    assert statistics.bootstrap(values) == (values.min(), values.max())


def test_undefined_is_none():
    undefined = ([None, float("nan")], [float("inf"), -float("inf")])
    for values in (np.zeros((2, 0)), *([row] for row in undefined)):
        assert statistics.rate(values) == (None, [None, None])
        assert statistics.mean(values) == (None, [None, None])
        found = statistics.paired(values, values)
        assert found.difference is None and found.ci95 == [None, None] and found.n == 0
    assert Column("title", "field", "up").cell({"field": None, "ci95": [None, None]}) == "n/a"


def test_ratings_of_one_are_a_mean_and_no_rate():
    found, interval = statistics.mean([[1.0, 1.0, 1.0]])
    assert found == 1.0 and interval == [1.0, 1.0]


def test_paired_rates_against_mcnemar():
    ours = np.array([[1] * 9 + [0] * 2 + [1] * 50 + [0] * 20], bool)
    reference = np.array([[0] * 9 + [1] * 2 + [1] * 50 + [0] * 20], bool)
    found = statistics.paired(ours, reference)
    assert (found.more, found.fewer, found.n) == (9, 2, 81)
    np.testing.assert_allclose(found.difference, 100 * 7 / 81)
    np.testing.assert_allclose(found.p, 2 * stats.binom.cdf(2, 11, 0.5))
    low, high = found.ci95
    # The normal interval of the differences of the items, which the bootstrap approaches.
    sd = (ours.astype(float) - reference).std() / 81**0.5
    np.testing.assert_allclose((low, high), found.difference + 196 * np.array([-sd, sd]), atol=1.5)


def test_equal_answers_leave_room_for_changes_not_seen():
    same = np.ones((1, 100), bool)
    found = statistics.paired(same, same)
    assert found.difference == 0 and found.p == 1.0 and (found.more, found.fewer) == (0, 0)
    np.testing.assert_allclose(found.ci95, 100 * statistics.wilson(0, 100)[1] * np.array([-1, 1]))


def test_differences_of_arms_by_task_and_figure():
    def outcome(refused, nll):
        answers = {"refused": {"start": refused, "keyword": refused}}
        return {"advbench": answers, "over_refusal": answers, "utility": {"nll": nll}}

    sets = select(("advbench", "over_refusal", "utility"), TASKS)
    outcomes = {
        "base": [outcome([True, True], [1.0, 2.0])],
        "fl": [outcome([False, True], [0.5, 1.0])],
    }
    found = comparison.differences(sets, outcomes, {"fl": ["base"]}, EvalOptions())
    assert [(d["task"], d["field"], d["difference"], d["p"]) for d in found] == [
        ("advbench", "safety", -50.0, 1.0),
        ("over_refusal", "rate", -50.0, 1.0),
        ("utility", "nll", -0.75, None),
    ]
