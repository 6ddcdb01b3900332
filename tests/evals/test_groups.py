"""Rates by group against plain counts, and the smallest difference against its exact power."""

import numpy as np
import pytest
from scipy import stats

from fedsafe_jax.evals import groups, statistics

NAMES = ["a", "b", "a", "", "b", "a", "c"]
VALUES = [[1, 0, 1, 1, 1, 0, None], [1, 0, 0, 1, 1, 0, None]]


def test_rates_are_plain_counts():
    rates = groups.rates(VALUES, NAMES, "safety")
    assert list(rates) == ["a", "b", "c"]
    assert rates["a"]["safety"] == pytest.approx(100 * (2 + 1) / 6) and rates["a"]["n"] == 3
    assert rates["b"]["safety"] == pytest.approx(100 * (1 + 1) / 4) and rates["b"]["n"] == 2
    assert rates["c"] == {
        "safety": None, "ci95": [None, None], "n": 0, "smallest_difference": None,
    }  # fmt: skip
    mean, interval = groups.macro(VALUES, NAMES)
    assert mean == pytest.approx((50 + 50) / 2) and interval[0] < mean < interval[1]
    assert groups.macro([[None]], ["a"]) == (None, [None, None])


def test_the_mean_of_one_group_is_its_rate():
    values = np.random.default_rng(0).random((3, 40)) < 0.8
    (mean, interval), (rate, expected) = groups.macro(values, ["a"] * 40), statistics.rate(values)
    assert mean == pytest.approx(rate) and interval == pytest.approx(expected)


def test_the_interval_of_a_macro_average_covers():
    """95% over draws from known rates, where small groups differ much from each other."""
    rng, sizes, rates = np.random.default_rng(1), (10, 25, 60), (0.95, 0.5, 0.2)
    names = [str(g) for g, size in enumerate(sizes) for _ in range(size)]
    chances = np.repeat(rates, sizes)
    inside = 0
    for _ in range(400):
        _, (low, high) = groups.macro([rng.random(len(names)) < chances], names)
        inside += low <= 100 * np.mean(rates) <= high
    assert 0.92 <= inside / 400 <= 0.99


@pytest.mark.parametrize(("rate", "n"), [(0.5, 200), (0.9, 100), (0.04, 250), (1.0, 100)])
def test_the_smallest_difference_has_a_power_of_80_percent(rate, n):
    """The pooled z-test of two proportions, over every pair of counts; more near 0 and 1."""
    gap = groups.smallest_difference(rate, n)
    other = rate - gap if rate - gap >= 0 and rate > 0.5 else rate + gap
    k = np.arange(n + 1)
    pooled = (k[:, None] + k) / (2 * n)
    with np.errstate(invalid="ignore"):
        z = (k[:, None] - k) / n / np.sqrt(2 * pooled * (1 - pooled) / n)
    chance = np.outer(stats.binom.pmf(k, n, rate), stats.binom.pmf(k, n, other))
    power = chance[np.abs(np.nan_to_num(z)) > 1.96].sum()
    assert 0.78 < power < (0.83 if 0.1 <= rate <= 0.9 else 0.96)
    assert groups.smallest_difference(rate, 4 * n) < gap


def test_too_few_items_show_nothing():
    assert groups.smallest_difference(0.5, 1) == 1
