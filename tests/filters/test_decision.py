"""Calibration and threshold, on scores whose distribution is known."""

import numpy as np
import pytest
from scipy.special import expit

from fedsafe_jax.filters import decision, quality


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
    assert np.isfinite(separable).all() and separable.temperature > 0.05


def test_thresholds_are_the_best_of_all():
    rng = np.random.default_rng(2)
    unsafe = rng.random(300) < 0.3
    p = np.clip(0.35 * unsafe + rng.uniform(0, 0.65, 300), 0, 1)

    def at(t):
        q = quality.quality(unsafe, p >= t)
        return q.hmean, q.precision / 100, q.recall / 100

    every = [at(t) for t in np.linspace(0, 1, 2001)]
    chosen = decision.choose_threshold(p, unsafe)
    assert at(chosen)[0] == pytest.approx(max(f for f, _, _ in every), abs=0.01)
    chosen = decision.choose_threshold(p, unsafe, "recall", 0.8)
    assert at(chosen)[1] >= 0.8
    assert at(chosen)[2] == pytest.approx(max(r for _, q, r in every if q >= 0.8), abs=0.01)
