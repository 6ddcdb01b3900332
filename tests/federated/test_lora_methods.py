"""The algebra of federated LoRA methods, on linear layers that are not square, against numpy."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedsafe_jax.federated import aggregation, algorithms, lora_average, simulation
from fedsafe_jax.federated.algorithms import Hyperparameters, fedrot_lora
from fedsafe_jax.federated.client import LocalTraining, make_optimizer
from fedsafe_jax.federated.mesh import make_mesh
from fedsafe_jax.federated.participation import Cohort
from fedsafe_jax.federated.round_programs import RoundSpec, make_round
from fedsafe_jax.models import lora

LAYERS, IN, OUT, RANK, STEPS, ROWS = 2, 7, 5, 3, 3, 6
SCALE = 2.0
WEIGHTS = np.array([1.0, 2.0, 5.0])
RANKS = (1, 3, 2)
RNG = np.random.default_rng(0)
W = RNG.normal(size=(LAYERS, IN, OUT)).astype(np.float32)
START = {
    "layers": {
        "q_proj": {
            "a": RNG.uniform(-0.4, 0.4, (LAYERS, IN, RANK)).astype(np.float32),
            "b": np.zeros((LAYERS, RANK, OUT), np.float32),
        }
    }
}


class Data(NamedTuple):
    """Batches with leaves `[clients, steps, rows, ...]`."""

    x: np.ndarray
    y: np.ndarray
    mask: np.ndarray
    segment_ids: np.ndarray


DATA = Data(
    RNG.normal(size=(3, STEPS, ROWS, IN)).astype(np.float32),
    RNG.normal(size=(3, STEPS, ROWS, LAYERS, OUT)).astype(np.float32),
    np.ones((3, STEPS, ROWS, 1), np.float32),
    np.ones((3, STEPS, ROWS, 1), np.int32),
)


def loss_fn(factors, base, batch):
    pair = factors["layers"]["q_proj"]
    whole = base + SCALE * (pair["a"] @ pair["b"])
    return jnp.mean(jnp.square(jnp.einsum("ri,lio->rlo", batch.x, whole) - batch.y))


def product(factors, dtype=np.float64):
    pair = factors["layers"]["q_proj"]
    return np.asarray(pair["a"], dtype) @ np.asarray(pair["b"], dtype)


@functools.cache
def run(name, rounds=2, clients=3, ranks=None, optimizer="sgd", weights=None, **changes):
    """The state after some rounds of all clients, the last report, and what each client sent in
    the last round, `{client: (factors at its start, update)}`."""
    hyperparameters = changes.pop("hyperparameters", None)
    training = LocalTraining(loss_fn, make_optimizer(optimizer, clip=0))
    method = algorithms.make(name, training, 3, hyperparameters)
    spec = RoundSpec(method, aggregation.make("mean"), ragged_ranks=ranks is not None, **changes)
    programs = make_round(spec, make_mesh(jax.devices()[:1]))
    state = simulation.initial_state(programs, START, 3)
    ids = np.arange(clients, dtype=np.int32)
    weights = np.asarray(WEIGHTS[:clients] if weights is None else weights, np.float32)
    cohort = Cohort(ids, weights, np.full(clients, STEPS), dropped_out=(), no_data=())
    for t in range(rounds):
        before, sent = state, {}
        state, report = simulation.run_round(
            programs,
            state,
            W,
            batches=lambda start, stop: jax.tree.map(lambda x: x[start:stop], DATA),
            cohort=cohort,
            rates=[0.1] * STEPS,
            chunk=clients,
            key=jax.random.fold_in(jax.random.key(0), t),
            ranks=None if ranks is None else np.array(ranks),
            keep_update=sent.__setitem__,
        )
    return state, report, before, sent


def client_products(before, sent, ranks=None):
    """The model of each client at the end of the round: residue and own product, float64."""
    start, unravel = jax.flatten_util.ravel_pytree(before.server.factors)
    models = []
    for client, update in sent.items():
        own = before.server.factors
        if ranks is not None:
            own = jax.tree.map(jnp.multiply, own, lora_average.rank_mask(own, ranks[client]))
        own = jax.tree.map(jnp.add, own, unravel(jnp.asarray(update)))
        models.append(product(own))
        if jax.tree.leaves(before.server.residue):
            models[-1] = models[-1] + product(before.server.residue)
    return np.stack(models)


EXACT = [("ffa_lora", None), ("rolora", None), ("fedsvd", None), ("fedex_lora", None)]
EXACT += [("flora", None), ("fedex_lora", RANKS), ("flora", RANKS)]


@pytest.mark.parametrize(("name", "ranks"), EXACT)
def test_the_global_model_is_the_mean_of_the_clients_models(name, ranks):
    state, report, before, sent = run(name, ranks=ranks)
    each = client_products(before, sent, ranks)
    mean = np.average(each, axis=0, weights=WEIGHTS)
    # Entries are about 0.3, float32 keeps 1e-7 of them, and decompositions a few times that.
    np.testing.assert_allclose(product(state.server.adapter), mean, atol=2e-6)
    assert report.product_gap < 2e-3  # norms of Gram matrices in float32: the root of 1e-7 and more
    assert np.abs(each - mean).max() > 1e-2  # clients do differ


def test_fedavg_of_the_same_clients_is_not():
    state, _, before, sent = run("fedavg")
    mean = np.average(client_products(before, sent), axis=0, weights=WEIGHTS)
    assert np.abs(product(state.server.adapter) - mean).max() > 1e-3


def test_mixed_ranks_share_one_scale():
    """Each client's own forward has the scale `alpha / lora_rank`, and so has the exported sum."""
    state, _, before, sent = run("flora", ranks=RANKS, rounds=1)
    trained = lora.LoraConfig(RANK, SCALE * RANK, ("q_proj",))
    config = lora.config_of(state.server.adapter, trained)
    assert config.rank == RANK + min(IN, OUT) and config.scale == pytest.approx(SCALE)
    merged = lora.update_of(lora.Adapter(state.server.adapter, config))
    means = SCALE * np.average(client_products(before, sent, RANKS), axis=0, weights=WEIGHTS)
    for layer in range(LAYERS):
        np.testing.assert_allclose(
            merged(("layers", "q_proj", "kernel"), layer), means[layer], atol=4e-6
        )
    stabilized = trained._replace(rank_stabilized=True)
    assert lora.config_of(state.server.adapter, stabilized).scale == pytest.approx(stabilized.scale)


def local_sgd(factors, client, trained=("a", "b"), residue=0.0, linear=None, alpha=0.0):
    """A client's steps of SGD by hand, float64: the gradient of the loss to W is `2 x^T e / n`;
    FedDyn's penalty adds `alpha (y - x) - linear`."""
    begin = factors["layers"]["q_proj"]
    linear = {"a": 0.0, "b": 0.0} if linear is None else linear["layers"]["q_proj"]
    pair = {k: np.asarray(v, np.float64) for k, v in factors["layers"]["q_proj"].items()}
    for step in range(STEPS):
        x, y = DATA.x[client, step], DATA.y[client, step]
        whole = W + SCALE * (residue + pair["a"] @ pair["b"])
        error = np.einsum("ri,lio->rlo", x, whole) - y
        g = SCALE * 2 * np.einsum("ri,rlo->lio", x, error) / error.size
        gradient = {
            "a": g @ pair["b"].swapaxes(-1, -2),
            "b": pair["a"].swapaxes(-1, -2) @ g,
        }
        for k in trained:
            pull = alpha * (pair[k] - begin[k]) - linear[k]
            pair[k] = pair[k] - 0.1 * (gradient[k] + pull)
    return {"layers": {"q_proj": pair}}


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        ("ffa_lora", ["b", "b"]),
        ("rolora", ["b", "a"]),
        ("fedex_lora", ["ab", "ab"]),
        ("fedrot_lora", ["ab", "ab"]),
    ],
)
def test_one_client_is_plain_lora(name, trained):
    state, *_ = run(name, clients=1)
    expected = local_sgd(local_sgd(START, 0, trained[0]), 0, trained[1])
    # A rotation of the slots turns their gradients too, so SGD goes on in the same products.
    np.testing.assert_allclose(product(state.server.adapter), product(expected), atol=1e-6)


def test_one_client_of_flora_is_plain_lora_that_begins_anew():
    state, _, before, _ = run("flora", clients=1)
    first = product(local_sgd(START, 0))
    np.testing.assert_allclose(product(before.server.adapter), first, atol=1e-6)
    own = local_sgd(before.server.factors, 0, residue=first)
    np.testing.assert_allclose(product(state.server.adapter), first + product(own), atol=1e-6)
    a = np.asarray(before.server.factors["layers"]["q_proj"]["a"])
    assert np.abs(a - START["layers"]["q_proj"]["a"]).max() > 0.1


@pytest.mark.parametrize("ranks", [None, RANKS])
def test_fedsa_shares_a_and_keeps_b(ranks):
    state, _, before, sent = run("fedsa_lora", ranks=ranks)
    pair = state.server.factors["layers"]["q_proj"]
    assert np.all(np.asarray(pair["b"]) == 0)
    personal = algorithms.ALGORITHMS["fedsa_lora"].personal
    ends = []
    for client in range(3):
        own = jax.tree.map(lambda x, client=client: x[client], before.clients["states"])
        begin = personal(before.server.factors, own)
        if ranks is not None:
            mask = lora_average.rank_mask(begin, ranks[client])
            begin = jax.tree.map(jnp.multiply, begin, mask)
        end = local_sgd(begin, client)["layers"]["q_proj"]
        kept = state.clients["states"]["layers"]["q_proj"]["b"][client]
        np.testing.assert_allclose(kept, end["b"], atol=1e-6)
        ends.append(end["a"])
    assert np.abs(kept).max() > 1e-2
    has = np.ones((3, RANK)) if ranks is None else np.arange(RANK) < np.array(ranks)[:, None]
    weights = WEIGHTS[:, None] * has
    mean = np.einsum("kr,klir->lir", weights, np.stack(ends)) / weights.sum(0)
    np.testing.assert_allclose(pair["a"], mean, atol=1e-6)


def test_one_client_of_fedsa_is_plain_lora():
    state, *_ = run("fedsa_lora", clients=1)
    own = jax.tree.map(lambda x: x[0], state.clients["states"])
    mine = algorithms.ALGORITHMS["fedsa_lora"].personal(state.server.factors, own)
    expected = product(local_sgd(local_sgd(START, 0), 0))
    np.testing.assert_allclose(product(mine), expected, atol=1e-6)


@pytest.mark.parametrize(("name", "frozen"), [("ffa_lora", "a"), ("rolora", "a"), ("fedsvd", "")])
def test_a_factor_that_is_not_trained_keeps_its_bits(name, frozen):
    """Also under weight decay, which moves a factor without any gradient."""
    state, _, _, sent = run(name, rounds=1, optimizer="adamw(weight_decay=0.5)")
    _, unravel = jax.flatten_util.ravel_pytree(START)
    for update in sent.values():
        assert np.all(np.asarray(unravel(jnp.asarray(update))["layers"]["q_proj"]["a"]) == 0)
    if frozen:
        pair = state.server.factors["layers"]["q_proj"]
        np.testing.assert_array_equal(pair[frozen], START["layers"]["q_proj"][frozen])


def test_noise_of_privacy_is_on_what_is_trained_alone():
    state, *_ = run("ffa_lora", rounds=1, clip_norm=0.1, noise_multiplier=1.0, cohort=3)
    pair = state.server.factors["layers"]["q_proj"]
    np.testing.assert_array_equal(pair["a"], START["layers"]["q_proj"]["a"])
    quiet, *_ = run("ffa_lora", rounds=1, clip_norm=0.1)
    assert np.abs(pair["b"] - quiet.server.factors["layers"]["q_proj"]["b"]).max() > 1e-3


def test_fedsvds_a_is_orthonormal_and_the_product_stays():
    state, *_ = run("fedsvd", rounds=1)
    plain, *_ = run("ffa_lora", rounds=1)
    pair = jax.tree.map(np.asarray, state.server.factors["layers"]["q_proj"])
    gram = pair["a"].swapaxes(-1, -2) @ pair["a"]
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(RANK), gram.shape), atol=1e-6)
    np.testing.assert_allclose(
        product(state.server.factors), product(plain.server.factors), atol=1e-6
    )
    u, s, vt = np.linalg.svd(product(plain.server.factors), full_matrices=False)
    np.testing.assert_allclose(np.linalg.norm(pair["b"], axis=-1), s[:, :RANK], atol=1e-6)
    # Also where the product has a smaller rank than its factors: here, no product at all.
    empty = lora_average.orthonormal(START)["layers"]["q_proj"]["a"]
    np.testing.assert_allclose(
        empty.swapaxes(-1, -2) @ empty, np.broadcast_to(np.eye(RANK), gram.shape), atol=1e-6
    )


@pytest.mark.parametrize("by_a", [True, False])
def test_fedrot_leaves_every_product_as_it_is(by_a):
    rng = np.random.default_rng(1)
    shapes = {"a": (LAYERS, IN, RANK), "b": (LAYERS, RANK, OUT)}
    reference = {k: jnp.float32(rng.normal(size=v)) for k, v in shapes.items()}
    # A client that is the reference in another basis, and a little further.
    turn = np.linalg.qr(rng.normal(size=(LAYERS, RANK, RANK)))[0]
    turn[:, 0] *= np.sign(np.linalg.det(turn))[:, None]
    noise = {k: 1e-2 * rng.normal(size=v) for k, v in shapes.items()}
    pair = {
        "a": jnp.float32(reference["a"] @ turn + noise["a"]),
        "b": jnp.float32(turn.swapaxes(-1, -2) @ reference["b"] + noise["b"]),
    }
    before = np.asarray(pair["a"], np.float64) @ np.asarray(pair["b"], np.float64)

    def distance(x):
        return np.linalg.norm(np.asarray(x["a"] - reference["a"]))

    distances = [distance(pair)]
    for strength in (0.5, 1.0):
        turned = fedrot_lora.align(pair, reference, by_a, strength)
        after = np.asarray(turned["a"], np.float64) @ np.asarray(turned["b"], np.float64)
        np.testing.assert_allclose(after, before, atol=1e-5)  # entries of about 2, in float32
        distances.append(distance(turned))
    assert distances[0] > distances[1] > distances[2] and distances[2] < 0.15
    same = fedrot_lora.align(pair, reference, by_a, 0.0)
    np.testing.assert_allclose(same["a"], pair["a"], atol=1e-6)


def test_rotations_have_determinant_one():
    m = np.random.default_rng(2).normal(size=(20, RANK, RANK)).astype(np.float32)
    rotations = np.asarray(fedrot_lora.nearest_rotation(jnp.asarray(m)))
    np.testing.assert_allclose(np.linalg.det(rotations), 1.0, atol=1e-5)
    # The best of many: no random rotation has a larger trace of M^T R.
    others = np.linalg.qr(np.random.default_rng(3).normal(size=(500, RANK, RANK)))[0]
    others[:, 0] *= np.sign(np.linalg.det(others))[:, None]
    best = np.einsum("nij,nij->n", m, rotations)
    assert np.all(np.einsum("nij,kij->nk", m, others) <= best[:, None] + 1e-5)


def test_fedrot_without_rotation_is_fedavg():
    still, *_ = run("fedrot_lora", rounds=3, hyperparameters=Hyperparameters(rotation=0.0))
    plain, *_ = run("fedavg", rounds=3)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6),
        still.server.factors,
        plain.server.factors,
    )
    turned, *_ = run("fedrot_lora", rounds=3, hyperparameters=Hyperparameters(rotation=1.0))
    assert np.abs(product(turned.server.factors) - product(plain.server.factors)).max() > 1e-4


def test_a_residue_of_a_limited_rank_says_what_it_leaves_out():
    state, report, before, sent = run(
        "fedex_lora", rounds=1, hyperparameters=Hyperparameters(residue_rank=1)
    )
    residue = state.server.residue["layers"]["q_proj"]
    assert residue["a"].shape == (LAYERS, IN, 1) and residue["b"].shape == (LAYERS, 1, OUT)
    mean = np.average(client_products(before, sent), axis=0, weights=WEIGHTS)
    left = mean - product(state.server.factors)
    best = np.linalg.svd(left, compute_uv=False)[:, 1:]
    rest = np.linalg.norm(mean - product(state.server.adapter))
    assert rest == pytest.approx(np.sqrt(np.sum(np.square(best))), rel=1e-3)
    assert report.product_gap == pytest.approx(rest / np.linalg.norm(mean), rel=2e-2)


def test_hetlora_weighs_by_the_length_of_the_product():
    state, _, before, sent = run("hetlora", rounds=1, product_weights=True)
    lengths = np.linalg.norm(client_products(before, sent).reshape(3, -1), axis=1)
    weights = WEIGHTS * lengths  # the cohort's own are 1 in a run
    moved = np.average(np.stack(list(sent.values())), axis=0, weights=weights)
    start, _ = jax.flatten_util.ravel_pytree(START)
    end, _ = jax.flatten_util.ravel_pytree(state.server.factors)
    np.testing.assert_allclose(end, start + moved, atol=1e-6)


def test_feddyn_equals_its_formulas():
    alpha, h = 0.3, 0.0
    x = START
    own = [jax.tree.map(np.zeros_like, START) for _ in range(3)]
    for _ in range(2):
        ends = [local_sgd(x, k, linear=own[k], alpha=alpha) for k in range(3)]
        deltas = [jax.tree.map(np.subtract, end, x) for end in ends]
        own = [jax.tree.map(lambda g, d: g - alpha * d, o, d) for o, d in zip(own, deltas)]  # noqa: B905
        mean = jax.tree.map(lambda *d: sum(d) / 3, *deltas)
        h = jax.tree.map(lambda d, old: old - alpha * d, mean, h or jax.tree.map(np.zeros_like, x))
        x = jax.tree.map(lambda x, d, h: x + d - h / alpha, x, mean, h)
    state, *_ = run(
        "feddyn", weights=(1.0, 1.0, 1.0), hyperparameters=Hyperparameters(dyn_alpha=alpha)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), state.server.factors, x)


def test_flasc_begins_with_the_largest_numbers():
    state, report, before, sent = run("flasc", hyperparameters=Hyperparameters(download_share=0.2))
    start, unravel = jax.flatten_util.ravel_pytree(before.server.factors)
    kept = int(np.ceil(0.2 * start.size))
    order = np.argsort(-np.abs(np.asarray(start)))[:kept]
    masked = np.zeros(start.size, np.float32)
    masked[order] = start[order]
    for client, update in sent.items():
        end = jax.flatten_util.ravel_pytree(local_sgd(unravel(jnp.asarray(masked)), client))[0]
        np.testing.assert_allclose(update, end - masked, atol=1e-6)
    end = jax.flatten_util.ravel_pytree(state.server.factors)[0]
    mean = np.average(np.stack(list(sent.values())), axis=0, weights=WEIGHTS)
    np.testing.assert_allclose(end, start + mean, atol=1e-6)
    assert report.bytes_down == 3 * 8 * kept


def test_local_training_takes_nothing_from_others():
    state, report, *_ = run("local")
    jax.tree.map(np.testing.assert_array_equal, state.server.factors, START)
    for client in range(3):
        own = jax.tree.map(lambda x, client=client: x[client], state.clients["states"])
        mine = algorithms.ALGORITHMS["local"].personal(state.server.factors, own)
        expected = product(local_sgd(local_sgd(START, client), client))
        np.testing.assert_allclose(product(mine), expected, atol=1e-6)
    assert (report.bytes_up, report.bytes_down) == (0, 0)


def test_bytes_are_of_what_is_sent():
    a, b = 4 * LAYERS * IN * RANK, 4 * LAYERS * RANK * OUT
    expected = {
        "ffa_lora": (b, a + b), "rolora": (a, a + b), "fedsa_lora": (a, a),
        "fedex_lora": (a + b, 4 * (a + b)), "flora": (a + b, 3 * (a + b)),
    }  # fmt: skip
    for name, (up, down) in expected.items():
        report = run(name)[1]
        assert (report.bytes_up, report.bytes_down) == (3 * up, 3 * down), name
    assert run("rolora", rounds=1)[1].bytes_up == 3 * b


def test_server_stages_see_one_adapter():
    state, *_ = run("fedex_lora", rounds=1)
    server = state.server
    doubled = jax.tree.map(lambda x: 2 * x, server.adapter)
    after = server.with_adapter(doubled)
    for part in ("factors", "residue"):
        jax.tree.map(
            lambda new, old: np.testing.assert_array_equal(new, 2 * old),
            getattr(after, part),
            getattr(server, part),
        )
