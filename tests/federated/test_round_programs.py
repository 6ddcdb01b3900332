"""The round against plain formulas, and over devices, chunks and vmap against one device."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from federation import (
    CLIENTS,
    IDS,
    LORA,
    SGD,
    STEPS,
    WEIGHTS,
    close,
    make_federation,
    sgd_by_hand,
)
from jax.flatten_util import ravel_pytree
from tiny import tiny_config

from fedsafe_jax.data.packing import Batch
from fedsafe_jax.federated import round_programs, simulation
from fedsafe_jax.federated.algorithms import Hyperparameters
from fedsafe_jax.federated.client import LocalSteps
from fedsafe_jax.federated.mesh import make_mesh
from fedsafe_jax.models import loss, microbatch
from fedsafe_jax.models.decoder import Decoder

ONES = np.ones(CLIENTS, np.float32)


@pytest.fixture(scope="module")
def federation():
    return make_federation()


def test_recomputed_layers_give_the_same_gradient(federation):
    batch = Batch(*(f[0, 0] for f in federation.batches))

    def gradient(remat):
        model = Decoder(tiny_config(remat=remat), LORA.scale)
        return jax.grad(lambda a: loss.packed_loss(model, a, federation.base, batch))(
            federation.adapter
        )

    close(gradient(True), gradient(False), atol=1e-6)


LAYOUTS = (
    {"devices": 4},
    {"devices": 2, "parallel": 2},
    {"parallel": 4},
    {"devices": 8, "model": 2},  # clients over 4, the base over pairs
    {"chunk": 1},
    {"chunk": 3},  # the last chunk is padded
    {"devices": 2, "chunk": 2},
)


def test_devices_chunks_and_vmap_give_what_one_device_gives(federation):
    spec = federation.spec("fedavg")
    one, _ = federation.run(spec)
    for layout in LAYOUTS:
        close(federation.run(spec, **layout)[0], one)
    spec = federation.spec("scaffold")
    one, _ = federation.run(spec)
    for layout in LAYOUTS[3::2]:
        close(federation.run(spec, **layout)[0], one)


@pytest.mark.parametrize(
    ("devices", "pass_tokens", "name", "accumulation"),
    # Rows of 12, cut to 6, 9 or 12 where that is the pass; then all rows in one pass.
    [(3, 8, "fedavg", 1), (1, 8, "scaffold", 3), (3, 24, "fedavg", 1)],
)
def test_passes_dealt_out_give_what_clients_in_turn_give(
    federation, monkeypatch, devices, pass_tokens, name, accumulation
):
    monkeypatch.setitem(microbatch.MICROBATCH_TOKENS, "cpu", pass_tokens)
    batches = jax.tree.map(np.copy, federation.batches)
    for client, step, row, filled in [
        (0, 0, 0, 5), (0, 1, 0, 9), (0, 1, 1, 0), (1, 0, 1, 7), (2, 2, 0, 6), (2, 2, 1, 3),
    ]:  # fmt: skip
        for x in batches:
            x[client, step, row, filled:] = 0
    for x in batches:
        x[3] = 0  # the last client has nothing
    federation = federation._replace(batches=batches)
    rates = [0.01] * (STEPS // accumulation)
    weights = ONES
    in_turn, wanted = federation.run(
        federation.spec(name, accumulation=accumulation), weights=weights, rates=rates
    )
    mesh = make_mesh(jax.devices()[:devices])
    spec = federation.spec(name, accumulation=accumulation, mesh=mesh)
    dealt, report = federation.run(
        spec, devices=devices, parallel=0, weights=weights, rates=rates, chunk=4
    )
    close(dealt, in_turn)
    np.testing.assert_allclose(report.losses, wanted.losses, rtol=1e-5)
    np.testing.assert_array_equal(report.active, wanted.active)
    assert not report.active[3].any() and report.active[:3].all()


@pytest.mark.parametrize(
    ("name", "mu", "rates", "accumulation"),
    [
        ("fedavg", 0.0, [0.01] * STEPS, 1),
        ("fedavg", 0.0, [0.02, 0.01, 0.005], 1),
        ("fedavg", 0.0, [0.01], STEPS),
        ("fedprox", 0.5, [0.05] * STEPS, 1),
    ],
)
def test_sgd_equals_a_loop_in_numpy(federation, name, mu, rates, accumulation):
    spec = federation.spec(name, SGD, accumulation, hyperparameters=Hyperparameters(prox_mu=mu))
    state, _ = federation.run(spec, rounds=1, rates=rates)
    ends = [
        sgd_by_hand(
            federation, federation.adapter, k, rates=rates, mu=mu, accumulation=accumulation
        )
        for k in range(CLIENTS)
    ]
    share = WEIGHTS / WEIGHTS.sum()
    expected = jax.tree.map(lambda *y: sum(w * v for w, v in zip(share, y, strict=True)), *ends)
    close(state.server.factors, expected, atol=1e-6)


def test_scaffold_control_under_sgd_is_option_two(federation):
    state, _ = federation.run(federation.spec("scaffold", SGD), rounds=1, weights=ONES)
    # Round 1 has zero controls: c_i = (x - y_i)/(K rate), so their mean gives the mean delta.
    own = state.clients["states"]
    scaled = jax.tree.map(lambda c: -c.sum(0) / 4 * STEPS * 0.01, own)
    moved = jax.tree.map(jnp.subtract, state.server.factors, federation.adapter)
    close(scaled, moved, atol=1e-6)
    close(state.server.control, jax.tree.map(lambda c: c.sum(0) / 6, own), atol=1e-6)


def test_scaffold_variants_agree_under_sgd(federation):
    # Correcting the gradient or the parameters is the same step when the step is the gradient.
    states = [
        federation.run(
            federation.spec("scaffold", SGD, hyperparameters=Hyperparameters(scaffold=variant)),
            rounds=3,
            weights=ONES,
        )[0]
        for variant in ("gradient", "post_step")
    ]
    close(states[0].server.factors, states[1].server.factors, atol=1e-6)
    # c_i = mean gradient against a difference of parameters over K * rate = 0.03.
    close(states[0].server.control, states[1].server.control, atol=1e-4)


def test_scaffold_starts_as_fedavg_and_then_differs(federation):
    runs = {
        (name, rounds): federation.run(federation.spec(name, SGD), rounds=rounds)[0].server.factors
        for name in ("scaffold", "fedavg")
        for rounds in (1, 3)
    }
    close(runs["scaffold", 1], runs["fedavg", 1])
    late = [jax.tree.leaves(runs[n, 3]) for n in ("scaffold", "fedavg")]
    assert max(np.abs(a - b).max() for a, b in zip(*late, strict=True)) > 1e-7


def test_clients_without_weight_leave_no_trace(federation):
    state, _ = federation.run(federation.spec("scaffold"), rounds=1)
    assert all(np.all(leaf[3:] == 0) for leaf in jax.tree.leaves(state.clients))
    for name in ("fedavg", "fedadam"):
        nobody, report = federation.run(federation.spec(name), rounds=1, weights=0 * ONES)
        jax.tree.map(np.testing.assert_array_equal, nobody.server.factors, federation.adapter)
        assert report.update_norm == 0 and report.skipped


def test_order_of_clients_does_not_matter(federation):
    order = np.array([2, 0, 3, 1])
    mixed = federation._replace(batches=Batch(*(f[order] for f in federation.batches)))
    spec = federation.spec("scaffold")
    close(
        mixed.run(spec, weights=WEIGHTS[order], ids=IDS[order])[0],
        federation.run(spec)[0],
    )


def test_one_client_is_the_identity(federation):
    state, _ = federation.run(
        federation.spec("fedavg", SGD), rounds=1, weights=np.array([0, 1, 0, 0], np.float32)
    )
    expected = sgd_by_hand(federation, federation.adapter, 1, rates=[0.01] * STEPS)
    close(state.server.factors, expected, atol=1e-6)


def test_no_collective_inside_local_training(federation):
    mesh = make_mesh(jax.devices()[:4])
    programs = round_programs.make_round(federation.spec(), mesh, 1)
    state = simulation.initial_state(programs, federation.adapter, 6)
    inputs = round_programs.ChunkInputs(
        federation.batches,
        WEIGHTS,
        np.ones(4, np.float32),
        ranks=np.zeros(4, np.int32),
        states=(),
        residuals=(),
    )
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("clients"))
    inputs = jax.device_put(inputs, split)
    rates = LocalSteps(jnp.full(STEPS, 0.01))
    train = programs.train.lower(state.server, federation.base, inputs, rates).compile()
    # Training gathers the metrics, once, after all steps: in no loop body, and nothing is summed.
    blocks = train.as_text().split("\n\n")
    assert not any("all-reduce(" in b for b in blocks)
    assert all("ENTRY" in b for b in blocks if "all-gather(" in b)
    sent = programs.train(state.server, federation.base, inputs, rates)[0]
    text = programs.collect.lower(None, sent).compile().as_text()
    # One sum over devices of the adapters; the others are of scalars.
    summed = [line for line in text.splitlines() if "all-reduce(" in line]
    params = sum(x.size for x in jax.tree.leaves(federation.adapter))
    assert sum(f"f32[{params}]" in line for line in summed) == 1


@pytest.mark.parametrize("sent", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["scaffold", "fedadam"])
def test_a_client_that_sends_no_number_is_left_out_and_named(federation, sent, name):
    update_scales = np.array([1, sent, 1, 1], np.float32)
    weights, spec = np.array([10, 20, 30, 5], np.float32), federation.spec(name)
    state, report = federation.run(spec, weights=weights, update_scales=update_scales)
    assert report.excluded == (1,) and not report.skipped
    expected, _ = federation.run(spec, weights=weights * np.float32([1, 0, 1, 1]))
    close(state, expected)
    assert np.isfinite(report.norms).all() and np.isfinite(report.cosines).all()


def test_a_round_in_which_all_diverge_is_skipped(federation):
    rates = [1e38] * STEPS  # the square of the update is infinite
    state, report = federation.run(federation.spec("fedadam", SGD), rounds=1, rates=rates)
    assert report.skipped and set(report.excluded) >= {0, 1, 2}
    jax.tree.map(np.testing.assert_array_equal, state.server.factors, federation.adapter)


def test_anomaly_figures_equal_numpy(federation):
    update_scales = np.array([1, -4, 1, 1], np.float32)
    _, report = federation.run(
        federation.spec("fedavg", SGD), rounds=1, update_scales=update_scales
    )
    ends = [
        sgd_by_hand(federation, federation.adapter, k, rates=[0.01] * STEPS) for k in range(CLIENTS)
    ]
    flat = np.stack(
        [
            np.concatenate([np.ravel(v) for v in jax.tree.leaves(e)])
            - np.concatenate([np.ravel(v) for v in jax.tree.leaves(federation.adapter)])
            for e in ends
        ]
    ).astype(np.float64)
    flat *= update_scales[:, None]
    mean = WEIGHTS @ flat / WEIGHTS.sum()
    norms = np.linalg.norm(flat, axis=1)
    np.testing.assert_allclose(report.norms, norms, rtol=1e-3)
    # Up to 4,096 parameters the sketch is exact; float32 differences of adapters are what is left.
    np.testing.assert_allclose(
        report.cosines, flat @ mean / norms / np.linalg.norm(mean), atol=2e-3
    )


def test_sketches_keep_angles():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 100_000)).astype(np.float32)
    b += 0.5 * a
    exact = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    sa, sb = round_programs.sketch(jnp.asarray(a)), round_programs.sketch(jnp.asarray(b))
    found = float(sa @ sb) / np.linalg.norm(a) / np.linalg.norm(b)
    assert abs(found - exact) < 4 / np.sqrt(round_programs.SKETCH)  # four standard errors


def test_stragglers_count_per_step(federation):
    # Client 0 gets one of three steps done: its step counts thrice, then all by the mean share.
    mask = federation.batches.mask.copy()
    mask[0, 1:] = 0
    slow = federation._replace(batches=federation.batches._replace(mask=mask))
    state, _ = slow.run(federation.spec("fedavg", SGD, normalize_steps=True), rounds=1)
    x0 = federation.adapter
    ends = [
        sgd_by_hand(federation, x0, k, rates=[0.01] * (1 if k == 0 else STEPS))
        for k in range(CLIENTS)
    ]
    p, tau = WEIGHTS / WEIGHTS.sum(), np.array([1, 3, 3, 3])
    expected = jax.tree.map(
        lambda x, *y: x + (p @ tau) * sum(p[k] * (y[k] - x) / tau[k] for k in range(CLIENTS)),
        x0,
        *ends,
    )  # FedNova, Equation 6
    close(state.server.factors, expected, atol=1e-6)


@pytest.mark.parametrize(
    "layout", [{}, {"chunk": 3}, {"devices": 2, "chunk": 2}, {"aggregator": "median"}]
)
def test_updates_handed_over_are_what_clients_moved_by(federation, layout):
    """Client 0 gets one of three steps done; client 3 has no weight, so nothing of it counts."""
    mask = federation.batches.mask.copy()
    mask[0, 1:] = 0
    slow = federation._replace(batches=federation.batches._replace(mask=mask))
    aggregator = {k: v for k, v in layout.items() if k == "aggregator"}
    spec = federation.spec("fedavg", SGD, normalize_steps=True, **aggregator)
    kept = {}

    def keep(client, update):
        assert client not in kept
        kept[client] = update

    places = {k: v for k, v in layout.items() if k != "aggregator"}
    state, _ = slow.run(spec, rounds=1, keep_update=keep, **places)
    plain, _ = slow.run(spec, rounds=1, **places)
    jax.tree.map(np.testing.assert_array_equal, state.server.factors, plain.server.factors)
    assert sorted(kept) == [0, 1, 2]
    start, unravel = ravel_pytree(federation.adapter)
    for k, update in kept.items():
        assert isinstance(update, np.ndarray)
        end = sgd_by_hand(
            federation, federation.adapter, k, rates=[0.01] * (1 if k == 0 else STEPS)
        )
        close(unravel(start + update), end, atol=1e-6)


def test_clients_of_different_rank(federation):
    ranks = np.array([1, 2, 4, 4], np.int32)
    spec = federation.spec("fedavg", optax.adam(1.0), ragged_ranks=True)
    state, _ = federation.run(spec, ranks=ranks, rounds=1, weights=ONES)
    close(federation.run(spec, ranks=ranks, rounds=1, weights=ONES, chunk=2)[0], state)
    # Each slot is the mean over the clients that have it.
    ends = []
    for k, rank in enumerate(ranks):
        x = jax.tree_util.tree_map_with_path(
            lambda path, v, rank=rank: (
                v * (np.arange(4) < rank)
                if path[-1].key == "a"
                else v * (np.arange(4) < rank)[:, None]
            ),
            federation.adapter,
        )
        start, optimizer = x, optax.adam(0.01)
        opt = optimizer.init(x)
        for s in range(STEPS):
            batch = Batch(*(f[k, s] for f in federation.batches))
            grad = federation.gradient(x, batch)
            updates, opt = optimizer.update(grad, opt)
            x = optax.apply_updates(x, updates)
        ends.append(jax.tree.map(jnp.subtract, x, start))
    q = state.server.factors["layers"]["self_attn"]["q_proj"]["a"]
    start = federation.adapter["layers"]["self_attn"]["q_proj"]["a"]
    moved = [e["layers"]["self_attn"]["q_proj"]["a"] for e in ends]
    for slot in range(4):
        have = [k for k in range(CLIENTS) if slot < ranks[k]]
        mean = sum(moved[k][..., slot] for k in have) / len(have)
        np.testing.assert_allclose(q[..., slot] - start[..., slot], mean, atol=2e-5)
