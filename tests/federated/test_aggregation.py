"""Aggregators against numpy, and what they promise against malicious clients."""

import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from fedsafe_jax.federated import aggregation

BYZANTINE, TRIM = 2, 0.2
RULES = {name: aggregation.make(name, TRIM, BYZANTINE) for name in aggregation.AGGREGATORS}


def apply(name, updates, weights):
    updates, weights = jnp.asarray(updates, jnp.float32), jnp.asarray(weights, jnp.float32)
    return np.asarray(RULES[name].combine(updates, weights, jnp.zeros(updates.shape[1])))


def krum_by_hand(x, f, select):
    n = len(x)
    distance = ((x[:, None] - x[None]) ** 2).sum(-1)
    scores = [np.sort(np.delete(distance[i], i))[: n - f - 2].sum() for i in range(n)]
    return x[np.argsort(scores, kind="stable")[:select]].mean(0)


def weiszfeld(x, w, steps=aggregation.RFA_STEPS):
    center = w @ x / w.sum()
    for _ in range(steps):
        beta = w / np.maximum(np.linalg.norm(x - center, axis=1), aggregation.RFA_SMOOTHING)
        center = beta @ x / beta.sum()
    return center


def by_hand(name, x, w):
    ranked = np.sort(x, axis=0)
    cut = int(np.ceil(TRIM * len(x)))
    return {
        "mean": lambda: w @ x / w.sum(),
        "median": lambda: np.median(x, axis=0),
        "trimmed_mean": lambda: ranked[cut : len(x) - cut].mean(0),
        "krum": lambda: krum_by_hand(x, BYZANTINE, 1),
        "multi_krum": lambda: krum_by_hand(x, BYZANTINE, len(x) - BYZANTINE),
        "geometric_median": lambda: weiszfeld(x, w),
    }[name]()


@pytest.mark.parametrize("clients", [7, 8, 20])
@pytest.mark.parametrize("name", aggregation.AGGREGATORS)
def test_equals_numpy(name, clients):
    rng = np.random.default_rng(clients)
    x, w = rng.normal(size=(clients, 30)), rng.uniform(1, 5, clients)
    # float32 sums of some thirty numbers of order 1.
    np.testing.assert_allclose(apply(name, x, w), by_hand(name, x, w), atol=1e-5)


@pytest.mark.parametrize("name", aggregation.AGGREGATORS)
def test_clients_without_weight_do_not_count(name):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(9, 12)), rng.uniform(1, 5, 9)
    w[[2, 5]] = 0
    x[2] = 1e6
    left = w > 0
    np.testing.assert_allclose(apply(name, x, w), by_hand(name, x[left], w[left]), atol=1e-5)
    assert np.all(apply(name, x, 0 * w) == 0)


finite = st.floats(-100, 100, width=32)
matrices = st.integers(7, 12).flatmap(
    lambda n: st.tuples(
        arrays.arrays(np.float32, (n, 4), elements=finite),
        st.lists(st.integers(1, 50), min_size=n, max_size=n),
        st.permutations(range(n)),
    )
)


@pytest.mark.parametrize("name", ["mean", "median", "trimmed_mean", "geometric_median"])
@hypothesis.settings(deadline=None, max_examples=30)
@hypothesis.given(drawn=matrices)
def test_order_of_clients_changes_nothing(name, drawn):
    # Krum's choice between equal scores depends on the order; any of them is its answer.
    x, w, order = drawn
    w, order = np.array(w, np.float32), list(order)
    # Values up to 100, so float32 sums differ by some 1e-4.
    np.testing.assert_allclose(apply(name, x, w), apply(name, x[order], w[order]), atol=1e-3)


@pytest.mark.parametrize("name", aggregation.AGGREGATORS)
@hypothesis.settings(deadline=None, max_examples=20)
@hypothesis.given(update=arrays.arrays(np.float32, 4, elements=finite), n=st.integers(7, 12))
def test_equal_clients_are_the_aggregate(name, update, n):
    found = apply(name, np.tile(update, (n, 1)), np.ones(n))
    np.testing.assert_allclose(found, update, atol=1e-4)


@pytest.mark.parametrize("name", ["median", "trimmed_mean", "krum", "multi_krum"])
@hypothesis.settings(deadline=None, max_examples=30)
@hypothesis.given(drawn=matrices, push=st.sampled_from([1e4, -1e6, 1e9]))
def test_few_malicious_clients_are_bounded(name, drawn, push):
    x, _, order = drawn
    n = len(x)
    f = {"median": (n - 1) // 2, "trimmed_mean": int(np.ceil(TRIM * n))}.get(name, BYZANTINE)
    bad = list(order)[:f]
    honest = np.delete(x, bad, axis=0)
    attacked = x.copy()
    attacked[bad] = push
    found = apply(name, attacked, np.ones(n))
    # Within the honest clients' range of every coordinate.
    assert np.all(found >= honest.min(0) - 1e-3) and np.all(found <= honest.max(0) + 1e-3)
    mean = apply("mean", attacked, np.ones(n))
    assert np.all(np.abs(mean) > np.abs(honest).max(0))  # the mean goes where it is pushed


def test_geometric_median_stays_near_the_honest():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(11, 20)).astype(np.float32)
    x[:4] = 1e4
    # RFA, Theorem 1: the distance is bounded by the honest spread, not by the push.
    assert np.linalg.norm(apply("geometric_median", x, np.ones(11)) - x[4:].mean(0)) < 10
    assert np.linalg.norm(apply("mean", x, np.ones(11))) > 1e4


def test_clip_shortens_to_the_limit():
    x = jnp.array([3.0, 4.0])
    np.testing.assert_allclose(aggregation.clip(x, jnp.float32(5), 1.0), [0.6, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(aggregation.clip(x, jnp.float32(5), 7.0), x)
