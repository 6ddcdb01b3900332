"""Simulated verdicts have the rates asked for."""

import numpy as np
import pytest
from filter_examples import pair

from fedsafe_jax.filters import quality
from fedsafe_jax.filters.simulated import simulate


def test_simulated_filters_have_their_rates():
    some = [pair(str(i), "r", "unsafe" if i % 10 < 3 else "safe") for i in range(20_000)]
    unsafe = np.array([e.label == "unsafe" for e in some])
    found = simulate(some, 0.737, 0.567, 0)
    q = quality.quality(unsafe, found >= 0.5)
    assert q.recall == pytest.approx(73.7, abs=2) and q.precision == pytest.approx(56.7, abs=2)
    # What the paper's filter leaves: 13% of the kept pairs are harmful.
    assert unsafe[found < 0.5].mean() == pytest.approx(0.129, abs=0.01)
    more = simulate(some, 0.9, 0.9, 0)
    assert np.all(more[unsafe] >= found[unsafe])
