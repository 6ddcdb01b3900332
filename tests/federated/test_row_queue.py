"""Rows of all clients in one queue, as accelerators compute them, against clients side by side.

The queue is computed on CPU here, in float32: sums have another order, and nothing else differs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from federation import CLIENTS, IDS, LORA, STEPS, close, make_federation
from tiny import tiny_config

from fedsafe_jax.data.packing import Batch, NoisyBatch
from fedsafe_jax.federated import round_programs, slots
from fedsafe_jax.federated.mesh import make_mesh
from fedsafe_jax.models import loss, row_queue
from fedsafe_jax.models.by_owner import by_owner
from fedsafe_jax.models.decoder import Decoder

# Rows of each client in each step; the last client has nothing, and another stops early.
FILLED = np.array([[2, 1, 2], [1, 1, 1], [2, 2, 0], [0, 0, 0]])
WEIGHTS = np.array([10.0, 20.0, 30.0, 5.0], np.float32)


@pytest.fixture(scope="module")
def federation():
    federation = make_federation()
    batches = jax.tree.map(np.copy, federation.batches)
    for client, step in np.ndindex(FILLED.shape):
        for x in batches:
            x[client, step, FILLED[client, step] :] = 0
    batches.mask[0, 0, :, :5] = 0  # a prompt
    batches.mask[1] *= 0.5
    return federation._replace(batches=batches)


def test_a_product_by_owner_is_that_of_each_row():
    rng = np.random.default_rng(0)
    x, g = rng.normal(size=(2, 7, 5, 6)).astype(np.float32)
    g = g[..., :4]
    factors = rng.normal(size=(3, 6, 4)).astype(np.float32)
    owner = np.array([2, 0, 2, 2, 0, 0, 2])  # one client has no row
    out, pull = jax.vjp(lambda x, w: by_owner(x, w, owner), x, factors)
    to_x, to_factors = pull(g)
    np.testing.assert_allclose(out, [a @ factors[k] for a, k in zip(x, owner, strict=True)], 1e-5)
    np.testing.assert_allclose(
        to_x, [b @ factors[k].T for b, k in zip(g, owner, strict=True)], rtol=1e-4, atol=1e-5
    )
    expected = np.zeros_like(factors, np.float64)
    for a, b, k in zip(x, g, owner, strict=True):
        expected[k] += a.T.astype(np.float64) @ b
    np.testing.assert_allclose(to_factors, expected, atol=1e-5)
    assert not np.any(to_factors[1])


def test_gradients_of_bfloat16_rows_are_summed_in_float32():
    """Numbers that bfloat16 holds, but not their sum: 64 rows of 1 + 1/128 each."""
    x = jnp.ones((64, 1, 1), jnp.bfloat16)
    factors = jnp.ones((2, 1, 1), jnp.float32)
    g = jnp.full((64, 1, 1), 1 + 1 / 128, jnp.bfloat16)
    _, pull = jax.vjp(lambda w: by_owner(x, w, jnp.arange(64) % 2), factors)
    np.testing.assert_array_equal(pull(g)[0].ravel(), 32 * (1 + 1 / 128))


@pytest.mark.parametrize("devices, dropout", [(1, 0.0), (4, 0.5)])
def test_a_queue_has_the_gradient_of_each_client(federation, devices, dropout):
    """On several devices too, with fewer rows than slots, and with masks that weigh."""
    model = Decoder(tiny_config(), LORA.scale, dropout)
    batches = Batch(*(x[:, 0] for x in federation.batches))
    if dropout:
        noise = np.random.default_rng(0).integers(2**32, size=batches.mask.shape, dtype="uint32")
        batches = NoisyBatch(**batches._asdict(), noise=noise)
    keys = jax.random.split(jax.random.key(0), CLIENTS)
    factors = jax.vmap(
        lambda key: jax.tree.map(
            lambda x: x + 0.1 * jax.random.normal(key, x.shape), federation.adapter
        )
    )(keys)
    loss_fn = loss.PackedLoss(model)
    mesh = make_mesh(jax.devices()[:devices]) if devices > 1 else None
    queued = row_queue.value_and_grad_in_queue(loss_fn, (4, 8), mesh)
    found = jax.jit(jax.vmap(queued, (0, None, 0)))(factors, federation.base, batches)
    padded = jax.vmap(jax.value_and_grad(loss_fn), (0, None, 0))
    expected = jax.jit(padded)(factors, federation.base, batches)
    close(found, expected, atol=2e-6)  # the largest gradient is 0.3
    assert all(not np.any(x[3]) for x in jax.tree.leaves(found))


@pytest.mark.parametrize(
    ("layout", "name", "options"),
    [
        ({"devices": 4}, "scaffold", {}),  # Adam, clipped, as all of them
        ({"devices": 2, "parallel": 1}, "fedprox", {}),  # clients of a device in turn
        ({"devices": 4, "model": 2, "chunk": 2}, "fedavg", {"ragged_ranks": True}),
        ({"chunk": 3}, "scaffold", {"accumulation": 3}),
    ],
)
def test_a_round_in_a_queue_is_a_round_of_clients_side_by_side(
    federation, monkeypatch, layout, name, options
):
    ranks = np.array([1, 2, 4, 4], np.int32) if options.get("ragged_ranks") else None
    rates = [0.01] * (STEPS // options.get("accumulation", 1))
    shared = {"weights": WEIGHTS, "rates": rates, "ranks": ranks, "ids": IDS}
    expected, wanted = federation.run(federation.spec(name, **options), parallel=4, **shared)
    for module in (round_programs, slots):
        monkeypatch.setattr(module, "platform_of", lambda mesh: "tpu")
    mesh = make_mesh(jax.devices()[: layout.get("devices", 1)], layout.get("model", 1))
    layout = {"parallel": 0} | layout
    spec = federation.spec(
        name, platform="tpu", mesh=None if layout["parallel"] else mesh, **options
    )
    state, report = federation.run(spec, rows=FILLED, **layout, **shared)
    # As between other layouts: Adam magnifies the order of summation where moments are tiny.
    close(state, expected)
    np.testing.assert_allclose(report.losses, wanted.losses, rtol=1e-5)
    np.testing.assert_array_equal(report.active, wanted.active)
    assert not report.active[3].any() and report.active[2].all() == ("accumulation" in options)


def test_slots_hold_the_fullest_step_and_follow_the_others():
    choose = row_queue.choose_slots
    assert choose(np.array([40, 33, 37])) == (30, 36, 40)
    assert choose(np.array([41])) == (36, 40, 44)  # sixteenths of 64
    assert choose(np.array([41]), devices=16) == (48,)
    assert choose(np.array([0, 0])) == choose(np.zeros(0, int)) == (1,)
    # Stragglers: steps that few clients take.
    few = np.linspace(96, 0, 25).astype(int)
    assert choose(few) == (32, 64, 96)
    rng = np.random.default_rng(0)
    for devices in (1, 3, 8):
        totals = rng.integers(0, 200, 30)
        slots = choose(totals, devices)
        assert not any(count % devices for count in slots) and list(slots) == sorted(set(slots))
        taken = row_queue.computed(totals, slots)
        assert (taken >= totals).all() and slots[-1] <= 1.125 * totals.max() + devices


def test_rows_are_counted_by_queue():
    rows = np.arange(10).reshape(5, 2)
    mesh = make_mesh(jax.devices()[:2])
    count = slots.queued_rows
    # All clients of a chunk of four; the second chunk has one.
    np.testing.assert_array_equal(count(mesh, 0, rows, 4), [rows[:4].sum(0), rows[4]])
    # A chunk of six, three on each of two devices, of which two at a time and then one.
    expected = [rows[:2].sum(0), rows[2], rows[3:].sum(0), [0, 0]]
    np.testing.assert_array_equal(count(mesh, 2, rows, 6), expected)
    assert slots.of_round(mesh, 0, True, rows, 4) == ()  # on CPU there are no slots


def test_a_loss_that_reads_more_than_the_factors_is_in_no_slots(federation, monkeypatch):
    for module in (round_programs, slots):
        monkeypatch.setattr(module, "platform_of", lambda mesh: "tpu")
    mesh = make_mesh(jax.devices()[:1])
    for name, queued in (("fedavg", True), ("fedex_lora", False), ("flora", False)):
        programs = round_programs.make_round(federation.spec(name), mesh, 0)
        assert bool(programs.slots(np.ones((3, 2), int), 4)) == queued
