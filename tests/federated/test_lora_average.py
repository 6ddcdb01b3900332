"""Averages of products against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from federation import IDS, SGD, WEIGHTS, make_federation
from jax.flatten_util import ravel_pytree

from fedsafe_jax.federated import lora_average
from fedsafe_jax.federated.algorithms import ALGORITHMS, Hyperparameters

RANK, SHAPE = 3, (2, 10, 8)  # layers, in, out
KEY = jax.random.key(5)


def adapters(clients, seed=0):
    rng, (layers, fan_in, fan_out) = np.random.default_rng(seed), SHAPE
    a = rng.normal(size=(clients, layers, fan_in, RANK)).astype(np.float32)
    b = rng.normal(size=(clients, layers, RANK, fan_out)).astype(np.float32)
    return {"layers": {"q_proj": {"a": a, "b": b}}}


@pytest.mark.parametrize("clients", [1, 2, 9])
def test_product_mean_is_the_best_of_its_rank(clients):
    stacked = adapters(clients)
    weights = np.arange(1, clients + 1, dtype=np.float32)
    pair = stacked["layers"]["q_proj"]
    mean = np.einsum(
        "k,klir,klro->lio", weights / weights.sum(), pair["a"], pair["b"], dtype=np.float64
    )
    u, s, vt = np.linalg.svd(mean, full_matrices=False)
    best = (u[..., :RANK] * s[:, None, :RANK]) @ vt[:, :RANK]
    found = lora_average.product_mean(stacked, jnp.asarray(weights), KEY)["layers"]["q_proj"]
    assert found["a"].shape == (2, 10, RANK) and found["b"].shape == (2, RANK, 8)
    np.testing.assert_allclose(found["a"] @ found["b"], best, atol=2e-5)
    gap = float(
        lora_average.product_gap(stacked, jnp.asarray(weights), {"layers": {"q_proj": found}})
    )
    expected = np.linalg.norm(mean - best) / np.linalg.norm(mean)
    assert abs(gap - expected) < 2e-3  # differences of Gram matrices in float32


def test_the_mean_of_factors_is_not_the_mean_of_products():
    stacked, weights = adapters(4), jnp.ones(4)
    pair = stacked["layers"]["q_proj"]
    factors = {"layers": {"q_proj": {k: jnp.asarray(v.mean(0)) for k, v in pair.items()}}}
    mean = np.einsum("klir,klro->lio", pair["a"], pair["b"]) / 4
    apart = np.asarray(factors["layers"]["q_proj"]["a"] @ factors["layers"]["q_proj"]["b"])
    expected = np.linalg.norm(apart - mean) / np.linalg.norm(mean)
    gap = float(lora_average.product_gap(stacked, weights, factors))
    assert expected > 0.3 and abs(gap - expected) < 1e-3


def test_a_round_averages_products():
    federation = make_federation()
    spec, factors = federation.spec("fedavg", SGD, product=True), federation.spec("fedavg", SGD)
    # From one state, after a round: there the factors of the clients differ in both.
    before = federation.run(factors, rates=[0.5] * 3)[0]
    options, sent = {"rates": [0.5] * 3, "state": before}, {}
    state, _ = federation.run(spec, **options, keep_update=sent.__setitem__)
    other, _ = federation.run(factors, **options)
    chunked, _ = federation.run(spec, **options, chunk=2)

    def product_of(factors):
        pair = factors["layers"]["self_attn"]["q_proj"]
        return np.asarray(pair["a"] @ pair["b"])

    def product(s):
        return product_of(s.server.factors)

    start, unravel = ravel_pytree(before.server.factors)
    products = [product_of(unravel(start + update)) for update in sent.values()]
    weights = [dict(zip(IDS.tolist(), WEIGHTS, strict=True))[client] for client in sent]
    mean = np.average(products, axis=0, weights=weights)
    gaps = [np.linalg.norm(product(s) - mean) for s in (state, other)]
    assert gaps[0] < 0.9 * gaps[1]
    np.testing.assert_allclose(product(chunked), product(state), atol=1e-5)
    assert np.abs(product(other) - product(state)).max() > 1e-6


def test_the_gap_is_estimated_from_sums_that_are_small():
    rng = np.random.default_rng(3)
    draws = {"a": (5, 6, 40, RANK), "b": (5, 6, RANK, 30)}
    pair = {k: rng.normal(size=v).astype(np.float32) for k, v in draws.items()}
    stacked, weights = {"layers": {"q_proj": pair}}, np.arange(1, 6, dtype=np.float32) / 15
    each = np.stack([
        lora_average.project_products({"layers": {"q_proj": {k: v[i] for k, v in pair.items()}}})
        for i in range(5)
    ])  # fmt: skip
    assert each.size < pair["b"].size * lora_average.PROBES
    # Linear: the mean projection is that of the mean product, here as an adapter of full rank.
    mean = np.einsum("k,klir,klro->lio", weights, pair["a"], pair["b"])
    whole = {"layers": {"q_proj": {"a": mean, "b": np.broadcast_to(np.eye(30), (6, 30, 30))}}}
    projected = weights @ each
    np.testing.assert_allclose(lora_average.project_products(whole), projected, atol=1e-4)
    factors = {
        "layers": {"q_proj": {k: np.einsum("k,k...->...", weights, v) for k, v in pair.items()}}
    }
    exact = float(lora_average.product_gap(stacked, jnp.asarray(weights), factors))
    estimate = float(lora_average.projected_gap(projected, factors))
    assert exact > 0.3 and abs(estimate - exact) < 0.25 * exact  # two standard errors


def products(factors):
    pair = factors["layers"]["q_proj"]
    return np.asarray(pair["a"], np.float64) @ np.asarray(pair["b"], np.float64)


def moved_without_updates(name, hyperparameters, current):
    """How far, of its length, the product of the factors moves in three rounds of no update."""
    algorithm = ALGORITHMS[name].make(None, 4, hyperparameters)
    server = algorithm.init(current)
    control = jax.tree.map(jnp.zeros_like, current) if ALGORITHMS[name].controls else ()
    for t in range(3):
        sent = jax.tree.map(lambda x: jnp.stack([x] * 4), server.factors)
        mean = lora_average.product_mean(sent, jnp.arange(1.0, 5), jax.random.fold_in(KEY, t))
        delta = jax.tree.map(jnp.subtract, mean, server.factors)
        server = algorithm.server_update(server, delta, control)
    before, after = products(current), products(server.factors)
    return np.linalg.norm(after - before) / np.linalg.norm(before)


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi"])
def test_only_algorithms_that_keep_the_mean_leave_a_product_without_updates_alone(name):
    current = jax.tree.map(lambda x: jnp.asarray(x[0]), adapters(1, seed=7))
    moved = moved_without_updates(name, Hyperparameters(), current)
    # Three decompositions in float32. The others move it by percents, hence the refusal.
    assert moved < 1e-5 if ALGORITHMS[name].keeps_mean else moved > 0.01
    if ALGORITHMS[name].keeps_mean:
        half = moved_without_updates(name, Hyperparameters(server_learning_rate=0.5), current)
        assert half > 0.1


def test_scaffolds_control_variates_would_stay_in_the_old_basis():
    assert ALGORITHMS["scaffold"].controls and not ALGORITHMS["scaffold"].keeps_mean


@pytest.mark.parametrize("rank_of_mean", [0, 1, 2])
def test_slots_that_the_mean_leaves_empty_learn_again(rank_of_mean):
    stacked = adapters(4, seed=2)
    pair = stacked["layers"]["q_proj"]
    pair["a"] = np.broadcast_to(pair["a"][:1], pair["a"].shape).copy()
    pair["b"][:, :, rank_of_mean:] = 0
    mean = lora_average.product_mean(stacked, jnp.ones(4), KEY)
    found = mean["layers"]["q_proj"]
    expected = np.einsum("klir,klro->lio", pair["a"], pair["b"], dtype=np.float64) / 4
    np.testing.assert_allclose(products(mean), expected, atol=2e-5)
    fresh = np.asarray(found["a"][..., rank_of_mean:])
    assert np.all(np.asarray(found["b"][:, rank_of_mean:]) == 0)
    # Drawn as in `lora.init`, so a loss reaches every slot: its gradient to b is `a^T G`.
    bound = 1 / np.sqrt(SHAPE[1])
    assert np.abs(fresh).max() <= bound and 0.2 * bound < fresh.std() < bound
    gradient = np.swapaxes(fresh, -1, -2) @ np.ones((SHAPE[0], SHAPE[1], SHAPE[2]))
    assert np.all(np.linalg.norm(gradient, axis=-1) > 1e-3)
    other = lora_average.product_mean(stacked, jnp.ones(4), jax.random.key(6))
    assert not np.array_equal(fresh, other["layers"]["q_proj"]["a"][..., rank_of_mean:])


def test_a_rank_above_the_sides_of_a_projection():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 1, 4, 6)), rng.normal(size=(2, 1, 6, 3))
    stacked = {"layers": {"q_proj": {"a": jnp.float32(a), "b": jnp.float32(b)}}}
    mean = lora_average.product_mean(stacked, jnp.ones(2), KEY)
    assert mean["layers"]["q_proj"]["a"].shape == (1, 4, 6)
    assert mean["layers"]["q_proj"]["b"].shape == (1, 6, 3)
    np.testing.assert_allclose(products(mean), np.mean(a @ b, axis=0), atol=2e-5)
