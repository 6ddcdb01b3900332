"""Rates of a filter on labelled pairs, and how honest its probabilities are."""

import numpy as np
import pytest
from scipy.special import expit

from fedsafe_jax.filters import quality


def test_quality_counts_and_rates():
    found = quality.quality([1, 1, 1, 0, 0], [1, 1, 0, 1, 0])
    assert (found.true_positive, found.false_negative, found.false_positive) == (2, 1, 1)
    assert found.accuracy == 60
    assert found.precision == found.recall == pytest.approx(200 / 3)
    assert found.hmean == pytest.approx(200 / 3)


@pytest.mark.parametrize(
    ("unsafe", "flagged", "rates"),
    [
        ([], [], (None, None, None, None)),
        ([0, 0], [0, 0], (100, None, None, None)),
        ([0, 0], [1, 0], (50, 0, None, None)),
        ([1, 0], [0, 0], (50, None, 0, None)),
        ([1, 0], [0, 1], (0, 0, 0, 0)),
    ],
)
def test_rates_that_are_not_defined_are_none(unsafe, flagged, rates):
    assert quality.quality(unsafe, flagged)[:4] == rates


def test_auroc_counts_pairs_in_order():
    unsafe, scores = np.array([1, 0, 1, 0, 0]), np.array([0.9, 0.1, 0.4, 0.4, 0.8])
    wins = [(a > b) + 0.5 * (a == b) for a in scores[unsafe == 1] for b in scores[unsafe == 0]]
    assert quality.auroc(unsafe, scores) == pytest.approx(np.mean(wins))
    assert quality.auroc([1, 1], [0.1, 0.2]) is None


def test_reliability_of_honest_and_of_boastful_probabilities():
    rng = np.random.default_rng(0)
    p = rng.uniform(size=20000)
    unsafe = rng.random(20000) < p
    assert quality.reliability(unsafe, p).error < 0.015  # the noise of 2,000 pairs a bin
    boastful = expit(3 * np.log(p / (1 - p)))
    assert quality.reliability(unsafe, boastful).error > 0.1


def test_resampling_gives_the_share():
    unsafe = np.arange(1000) < 700
    chosen = quality.resample(unsafe, 0.3, seed=0)
    assert len(chosen) == 429 and unsafe[chosen].mean() == pytest.approx(0.3, abs=0.01)
