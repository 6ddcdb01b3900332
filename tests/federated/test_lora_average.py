"""Averages of products against numpy."""

import jax.numpy as jnp
import numpy as np
import pytest
from federation import SGD, make_federation

from fedsafe_jax.federated import lora_average

RANK, SHAPE = 3, (2, 10, 8)  # layers, in, out


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
    found = lora_average.product_mean(stacked, jnp.asarray(weights))["layers"]["q_proj"]
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
    # Two rounds: after the first, the factors of all clients differ in both.
    spec = federation.spec("fedavg", SGD, product=True)
    rates = [0.5] * 3
    state, report = federation.run(spec, rounds=2, rates=rates)
    other, factor_report = federation.run(federation.spec("fedavg", SGD), rounds=2, rates=rates)
    assert report.product_gap < factor_report.product_gap
    chunked, _ = federation.run(spec, rounds=2, rates=rates, chunk=2)

    def product(s):
        pair = s.server.factors["layers"]["self_attn"]["q_proj"]
        return np.asarray(pair["a"] @ pair["b"])

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
