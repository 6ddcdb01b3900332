"""Calibration and threshold, on scores whose distribution is known."""

import dataclasses

import numpy as np
import pytest
from filter_examples import pair
from scipy.special import expit

from fedsafe_jax.cai import revise
from fedsafe_jax.filters import actions, decision, quality
from fedsafe_jax.filters.cache import ScoreCache
from fedsafe_jax.filters.decision import FilterError


def test_temperature_undoes_boasting():
    rng = np.random.default_rng(1)
    z = rng.normal(size=20000) * 2
    unsafe = rng.random(20000) < expit(z)
    found = decision.fit(3 * z, unsafe)
    assert found.temperature == pytest.approx(3, rel=0.05)
    assert found.bias == pytest.approx(0, abs=0.05)
    assert quality.reliability(unsafe, found.probability(3 * z)).error < 0.015


def test_decisions_are_made_for_the_share_that_is_expected():
    rng = np.random.default_rng(4)
    unsafe = rng.random(20000) < 0.5
    z = rng.normal(size=20000) + np.where(unsafe, 1.0, -1.0)  # log-odds are 2 z
    found = decision.fit(z, unsafe, share=0.2)
    assert found.temperature == pytest.approx(0.5, rel=0.05)
    assert found.bias == pytest.approx(np.log(0.2 / 0.8), abs=0.1)
    some = quality.resample(unsafe, 0.2, seed=0)
    assert quality.reliability(unsafe[some], found.probability(z[some])).error < 0.015

    def hmean(t):
        return quality.quality(unsafe[some], found.probability(z[some]) >= t).hmean

    best = max(hmean(t) for t in np.linspace(0.01, 0.99, 99))
    assert hmean(found.threshold) == pytest.approx(best, abs=1)
    separable = decision.fit([-3.0, -2.0, 2.0, 3.0], [False, False, True, True])
    assert np.isfinite(separable.bias) and 0.05 < separable.temperature < np.inf


def test_thresholds_are_the_best_of_all():
    rng = np.random.default_rng(2)
    unsafe = rng.random(300) < 0.3
    p = np.clip(0.35 * unsafe + rng.uniform(0, 0.65, 300), 0, 1)

    def at(t):
        q = quality.quality(unsafe, p >= t)
        # Nothing is flagged above the highest score: no threshold is to be chosen there.
        return q.hmean or 0.0, (q.precision or 0.0) / 100, q.recall / 100

    every = [at(t) for t in np.linspace(0, 1, 2001)]
    chosen = decision.choose_threshold(p, unsafe)
    assert at(chosen)[0] == pytest.approx(max(f for f, _, _ in every), abs=0.01)
    chosen = decision.choose_threshold(p, unsafe, "recall", 0.8)
    assert at(chosen)[1] >= 0.8
    assert at(chosen)[2] == pytest.approx(max(r for _, q, r in every if q >= 0.8), abs=0.01)


def test_scores_of_a_filter_that_learned_little_are_calibrated():
    """All raw scores lie far below zero and close together; the labels still follow them."""
    rng = np.random.default_rng(3)
    z = rng.normal(size=20000)
    unsafe = rng.random(20000) < expit(2 * z - 1)
    raw = -7 + 1e-3 * z
    scores = decision.fit(raw, unsafe)
    assert not scores.at_bound
    assert quality.reliability(unsafe, scores.probability(raw)).error < 0.015


@pytest.mark.parametrize("raw", [np.full(200, -3.0), np.where(np.arange(200) % 2, -1.0, 1.0)])
def test_scores_that_do_not_rise_with_the_labels_say_so(raw):
    scores = decision.fit(raw, np.arange(200) % 2 == 1)
    assert scores.at_bound and np.isfinite([scores.temperature, scores.bias]).all()
    probability = scores.probability(raw)
    np.testing.assert_allclose(probability, 0.5, atol=0.01)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_scores_that_are_not_finite_let_nothing_pass(tmp_path, wrong):
    """NaN is below every threshold: a filter whose weights overflow flagged nothing, unsaid."""
    with pytest.raises(FilterError, match="1 of 2 scores of the filter are not finite"):
        decision.Decision().probability([1.0, wrong])

    class Overflowing:
        decision = decision.Decision()

        def log_odds(self, pairs):
            return np.full(len(pairs), wrong, np.float32)

    scores = ScoreCache(tmp_path, "overflowing")
    with pytest.raises(FilterError, match="1 of 1 scores"):
        scores.log_odds([pair("a", "b", "safe", "x")], Overflowing)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("field", ["temperature", "threshold", "bias"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, "0.5", None, [0.5], True, 10**400])
def test_no_decision_holds_a_wrong_number(field, value):
    with pytest.raises(FilterError, match=field):
        decision.Decision(**{field: value})


@pytest.mark.parametrize(
    "fields", [{"temperature": 0.0}, {"temperature": -1.0}, {"threshold": -0.1}, {"threshold": 2}]
)
def test_no_decision_holds_a_number_out_of_its_range(fields):
    """A negative temperature turns all verdicts round; above 1 a threshold flags nothing."""
    with pytest.raises(FilterError, match=next(iter(fields))):
        decision.Decision(**fields)
    with pytest.raises(FilterError):
        dataclasses.replace(decision.Decision(), **fields)


def test_all_but_what_is_surely_below_is_flagged():
    np.testing.assert_array_equal(decision.flag([0.1, 0.5, 0.9], 0.5), [False, True, True])
    assert decision.flag(np.array([0.9], np.float32), 0.9).all()  # float32's 0.9 is below 0.9
    for wrong in (np.nan, np.inf, -0.1, 1.1):
        with pytest.raises(FilterError, match="1 of 2 scores"):
            decision.flag([0.1, wrong], 0.5)
        with pytest.raises(FilterError, match="threshold"):
            decision.flag([0.1], wrong)
        # As whoever acts, and whoever judges revisions, decides by it.
        with pytest.raises(FilterError):
            actions.apply("drop", [pair("a", "b", "unsafe", "x")], np.array([wrong]), 0.5)
        judge = revise.Judge([True], lambda dialogues, answers, p=wrong: np.array([p]), 0.5)
        with pytest.raises(FilterError):
            revise._wrong([(("user", "a"),)], ["b"], None, judge)
