"""The jitted round against plain formulas, and over several devices against one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import tiny_config

from fedsafe_jax.data.packing import Batch
from fedsafe_jax.federated import aggregation, algorithms, mesh, round
from fedsafe_jax.models import lora, loss
from fedsafe_jax.models.decoder import Decoder
from fedsafe_jax.models.sharding import leaf_sharding

CLIENTS, STEPS, ROWS, SEQ = 4, 3, 2, 12
LORA = lora.LoraConfig(4, 8.0, ("q_proj", "v_proj"))


@pytest.fixture(scope="module")
def setup():
    config = tiny_config()
    model = Decoder(config, LORA.scale)
    blank = jnp.zeros((1, 4), jnp.int32)
    base = model.init(jax.random.key(0), blank, blank, blank)["params"]
    adapter = lora.init(jax.random.key(1), config, LORA)
    rng = np.random.default_rng(0)
    shape = (CLIENTS, STEPS, ROWS, SEQ)
    batches = Batch(
        rng.integers(0, 97, shape).astype(np.int32),
        rng.integers(0, 97, shape).astype(np.int32),
        np.ones(shape, np.float32),
        np.ones(shape, np.int32),
        np.broadcast_to(np.arange(SEQ, dtype=np.int32), shape).copy(),
    )

    def loss_fn(adapter, base, batch):
        return loss.packed_loss(model, adapter, base, batch)

    return loss_fn, base, adapter, batches


IDS = np.arange(CLIENTS, dtype=np.int32)
WEIGHTS = np.array([10.0, 20.0, 30.0, 0.0], np.float32)


def run(
    setup, name, devices, optimizer=None, parallel=1, rounds=2, weights=WEIGHTS, ids=IDS, model=1
):
    loss_fn, base, adapter, batches = setup
    devices = mesh.make_mesh(jax.devices()[:devices], model)
    if model > 1:
        base = jax.tree_util.tree_map_with_path(
            lambda path, x: jax.device_put(
                x, leaf_sharding([key.key for key in path], x.shape, devices)
            ),
            base,
        )
    algorithm = algorithms.ALGORITHMS[name](loss_fn, optimizer or algorithms.local_optimizer())
    state = algorithm.init(jax.tree.map(jnp.copy, adapter), 6)
    fn = round.make_round(algorithm, devices, parallel)
    for _ in range(rounds):
        state, metrics = fn(state, base, batches, ids, weights, jnp.float32(0.01))
    return state, metrics


def test_recomputed_layers_give_the_same_gradient(setup):
    _, base, adapter, batches = setup
    batch = Batch(*(f[0, 0] for f in batches))

    def gradient(remat):
        model = Decoder(tiny_config(remat=remat), LORA.scale)
        return jax.grad(lambda a: loss.packed_loss(model, a, base, batch))(adapter)

    close(gradient(True), gradient(False), atol=1e-6)


def close(a, b, atol=2e-5):
    # Adam divides by the root of tiny second moments, which magnifies the order of summation.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


@pytest.mark.parametrize("name", ["fedavg", "scaffold"])
def test_devices_and_vmap_give_what_one_device_gives(setup, name):
    one, _ = run(setup, name, 1)
    close(run(setup, name, 4)[0], one)
    close(run(setup, name, 2, parallel=2)[0], one)
    close(run(setup, name, 1, parallel=4)[0], one)
    close(run(setup, name, 8, model=2)[0], one)  # clients 4, the base split over pairs
    close(run(setup, name, 2, model=2)[0], one)


def test_fedavg_with_sgd_equals_a_loop_in_numpy(setup):
    loss_fn, base, adapter, batches = setup
    state, _ = run(setup, "fedavg", 1, optax.identity(), rounds=1)
    locals_ = []
    for k in range(CLIENTS):
        x = adapter
        for s in range(STEPS):
            batch = Batch(*(f[k, s] for f in batches))
            x = jax.tree.map(lambda p, g: p - 0.01 * g, x, jax.grad(loss_fn)(x, base, batch))
        locals_.append(x)
    share = WEIGHTS / WEIGHTS.sum()
    expected = jax.tree.map(lambda *leaves: sum(w * v for w, v in zip(share, leaves)), *locals_)  # noqa: B905
    close(state.adapter, expected, atol=1e-6)


def test_scaffold_control_under_sgd_is_option_two(setup):
    _, _, adapter, _ = setup
    one, _ = run(setup, "scaffold", 1, optax.identity(), rounds=1, weights=np.ones(4, np.float32))
    # Round 1 has zero controls: c_i = (x - y_i)/(K rate), so their mean gives the mean delta.
    scaled = jax.tree.map(lambda c: -c.sum(0) / 4 * STEPS * 0.01, one.client_states)
    moved = jax.tree.map(jnp.subtract, one.adapter, adapter)
    close(scaled, moved, atol=1e-6)
    total = jax.tree.map(lambda c: c.sum(0) / 6, one.client_states)
    close(one.control, total, atol=1e-6)


def test_scaffold_starts_as_fedavg_and_then_differs(setup):
    sgd = optax.identity()
    close(
        run(setup, "scaffold", 1, sgd, rounds=1)[0].adapter,
        run(setup, "fedavg", 1, sgd, rounds=1)[0].adapter,
    )
    late = [
        jax.tree.leaves(run(setup, n, 1, sgd, rounds=3)[0].adapter) for n in ("scaffold", "fedavg")
    ]
    assert max(np.abs(a - b).max() for a, b in zip(*late, strict=True)) > 1e-7


def test_clients_without_weight_leave_no_trace(setup):
    state, _ = run(setup, "scaffold", 1, rounds=1)
    assert all(np.all(leaf[3:] == 0) for leaf in jax.tree.leaves(state.client_states))
    nobody, metrics = run(setup, "fedavg", 1, rounds=1, weights=np.zeros(4, np.float32))
    jax.tree.map(np.testing.assert_array_equal, nobody.adapter, setup[2])
    assert metrics.update_norm == 0


def test_order_of_clients_does_not_matter(setup):
    loss_fn, base, adapter, batches = setup
    order = np.array([2, 0, 3, 1])
    mixed = (loss_fn, base, adapter, Batch(*(f[order] for f in batches)))
    close(
        run(mixed, "scaffold", 1, weights=WEIGHTS[order], ids=IDS[order])[0],
        run(setup, "scaffold", 1)[0],
    )


def test_no_collective_inside_local_training(setup):
    loss_fn, base, adapter, batches = setup
    algorithm = algorithms.fedavg(loss_fn, algorithms.local_optimizer())
    fn = round.make_round(algorithm, mesh.make_mesh(jax.devices()[:4]), 1)
    state = algorithm.init(adapter, 6)
    text = fn.lower(state, base, batches, IDS, WEIGHTS, jnp.float32(0.01)).compile().as_text()
    blocks = text.split("\n\n")
    assert "all-reduce" in text
    # The aggregation's all-reduce stands in the entry computation, none in a loop body.
    assert all("ENTRY" in b or "HloModule" in b for b in blocks if "all-reduce(" in b)


def test_cohort_is_padded_to_the_mesh(setup):
    batches, ids, weights = round.pad_cohort(
        Batch(*(f[:3] for f in setup[3])), IDS[:3], WEIGHTS[:3], 4
    )
    assert batches.tokens.shape[0] == 4 and weights[3] == 0 and batches.mask[3].sum() == 0


def test_weighted_mean_of_golden_vectors():
    # OpenFedLLM's server on x0=[1,-1], n=[10,30] after round 0 (its own code, float64).
    deltas = jnp.array([[0.5, -0.2], [-0.3, 0.4]])
    step = aggregation.weighted_mean(deltas, jnp.array([10.0, 30.0]))
    np.testing.assert_allclose(np.array([1.0, -1.0]) + step, [0.9, -0.75], atol=1e-6)
