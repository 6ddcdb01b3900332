"""Losses that hold clients to a reference: against formulas, and at their limits.

`test_torch` has two whole rounds against a loop in torch.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from federation import CLIENTS, LORA, close, make_federation
from tiny import tiny_config

from fedsafe_jax.data.chat import Encoded
from fedsafe_jax.data.packing import Batch, NoisyBatch, pack
from fedsafe_jax.federated import algorithms
from fedsafe_jax.federated.algorithms import Hyperparameters, ServerState, constrained_sft, kl_start
from fedsafe_jax.federated.algorithms import referenced as referenced_algorithms
from fedsafe_jax.federated.client import LocalSteps, LocalTraining
from fedsafe_jax.federated.mesh import make_mesh
from fedsafe_jax.models import row_queue
from fedsafe_jax.models.decoder import Decoder
from fedsafe_jax.models.loss import PackedLoss
from fedsafe_jax.models.reference_loss import Frozen, ReferenceLoss

BETAS = (0.5, 2.0, 2.0, 2.0, 2.0, 0.1)
MODEL = Decoder(tiny_config(), LORA.scale, lora_dropout=0.5)


@pytest.fixture(scope="module")
def federation():
    """Clients with answers of several tokens behind prompts; the last one has no rows."""
    federation = make_federation()
    batches = jax.tree.map(lambda x: np.copy(x[:, 0]), federation.batches)
    batches.mask[..., :3] = batches.mask[..., -1] = 0
    batches.mask[1] *= 0.5
    for x in batches:
        x[1, 1:], x[3] = 0, 0
    return federation._replace(batches=batches)


def moved(factors, seed):
    """Factors that are another model's."""
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    return jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), factors)


def largest(tree):
    return max(float(np.abs(x).max()) for x in jax.tree.leaves(tree))


def test_places_count_from_the_beginning_of_each_answer():
    """Two dialogues in a row, the first with two answers that are learned."""
    first = Encoded(np.arange(9), np.array([0, 0, 1, 1, 0, 1, 1, 1, 1], bool))
    second = Encoded(np.arange(5), np.array([0, 1, 1, 1, 1], bool))
    batch = pack([first, second], 16, rows=2)
    places = np.asarray(constrained_sft.places_in_answers(batch))
    assert places[0][batch.mask[0] > 0].tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 2, 3]
    # An answer that is learned up to the next dialogue.
    touching = batch._replace(
        mask=np.ones((1, 6), np.float32), segment_ids=np.array([[1, 1, 1, 2, 2, 2]])
    )
    assert constrained_sft.places_in_answers(touching).tolist() == [[0, 1, 2, 0, 1, 2]]


def test_weights_are_the_gradient_of_the_papers_loss():
    """`-(2 / beta) log sigmoid(beta d)`, Equation 3, whose gradient with respect to d is `-w`."""
    gains = jnp.float32(np.random.default_rng(0).normal(size=(2, 9)))
    places = jnp.broadcast_to(jnp.arange(9), (2, 9))
    beta = np.array([*BETAS, 0.1, 0.1, 0.1], np.float32)
    gradient = jax.grad(lambda d: jnp.sum(-2 / beta * jax.nn.log_sigmoid(beta * d)))(gains)
    found = constrained_sft.weights(gains, places, BETAS)
    np.testing.assert_allclose(found, -gradient, rtol=1e-6)
    far = constrained_sft.weights(jnp.float32([99.0]), jnp.array([1]), BETAS)
    np.testing.assert_allclose(far, 1e-3)


def test_at_their_limits_the_losses_are_plain_fine_tuning(federation):
    """Without beta, without weight, and at the reference; a loss is plain at all times."""
    batch = Batch(*(x[0] for x in federation.batches))
    start, factors = moved(federation.adapter, 1), moved(federation.adapter, 2)
    plain, gradient = jax.jit(jax.value_and_grad(PackedLoss(MODEL)))(
        factors, federation.base, batch
    )

    @jax.jit
    def both(reference, betas, weight):
        """Of both methods in one program."""
        frozen = Frozen(federation.base, reference)

        def gradients(of_tokens):
            return jax.value_and_grad(ReferenceLoss(MODEL, of_tokens))(factors, frozen, batch)

        return (
            gradients(lambda tokens: constrained_sft.constrained(tokens, betas)),
            gradients(lambda tokens: kl_start.held(tokens, weight)),
        )

    def check(found, is_plain):
        for value, own in found:
            assert float(value) == pytest.approx(float(plain), rel=1e-5)
            # Gradients are about 0.1, in float32; the packed loss sums them in another order.
            apart = largest(jax.tree.map(jnp.subtract, own, gradient))
            assert apart < 1e-6 if is_plain else apart > 1e-3

    betas, none = jnp.float32(BETAS), jnp.zeros(6)
    check(both(start, none, 0.0), True)
    check(both(factors, betas, 5.0), True)
    check(both(start, betas, 5.0), False)


def test_the_gradients_are_the_formulas(federation):
    """`sum_t w_t grad nll_t / n` by token, and `grad L + weight grad KL` from dense logits."""
    batch = Batch(*(x[0] for x in federation.batches))
    start, factors = moved(federation.adapter, 1), moved(federation.adapter, 2)

    def log_probabilities(factors):
        variables = {"params": federation.base, "lora": factors}
        rows = batch.tokens, batch.positions, batch.segment_ids
        return jax.nn.log_softmax(MODEL.apply(variables, *rows, method="logits"))

    on, n = batch.mask > 0, np.sum(batch.mask > 0)
    beta = np.array([0, 0, 0, *BETAS, 0.1, 0.1, 0], np.float32)

    def of_targets(logs):
        return jnp.take_along_axis(logs, batch.targets[..., None], -1)[..., 0]

    def paper(factors):
        gains = of_targets(log_probabilities(factors)) - of_targets(log_probabilities(start))
        each = -2 / jnp.maximum(beta, 1e-3) * jax.nn.log_sigmoid(beta * gains)
        return jnp.sum(jnp.where(on, each, 0)) / n

    def with_divergence(factors):
        logs, fixed = log_probabilities(factors), log_probabilities(start)
        apart = jnp.sum(jnp.exp(fixed) * (fixed - logs), -1)
        return jnp.sum(jnp.where(on, 5.0 * apart - of_targets(logs), 0)) / n

    @jax.jit
    def gradients(factors):
        frozen = Frozen(federation.base, start)
        found = [
            jax.grad(ReferenceLoss(MODEL, of_tokens))(factors, frozen, batch)
            for of_tokens in (
                lambda tokens: constrained_sft.constrained(tokens, BETAS),
                lambda tokens: kl_start.held(tokens, 5.0),
            )
        ]
        return found, [jax.grad(paper)(factors), jax.grad(with_divergence)(factors)]

    found, expected = gradients(factors)
    close(found, expected, atol=1e-6)  # of up to 0.5, in float32
    assert largest(expected) > 1e-2


def test_a_queue_has_the_gradient_of_each_client(federation):
    """As on accelerators, over several devices; dropout is on what is trained alone."""

    def of_tokens(tokens):
        return constrained_sft.constrained(tokens, BETAS) + kl_start.held(tokens, 1.0)

    loss_fn = ReferenceLoss(MODEL, of_tokens)
    clients = [moved(federation.adapter, seed) for seed in range(CLIENTS)]
    factors = jax.tree.map(lambda *x: jnp.stack(x), *clients)
    shape = federation.batches.mask.shape
    noise = np.random.default_rng(0).integers(2**32, size=shape, dtype="uint32")
    batches = NoisyBatch(**federation.batches._asdict(), noise=noise)
    frozen = Frozen(federation.base, moved(federation.adapter, 9))
    queued = row_queue.value_and_grad_in_queue(loss_fn, (8,), make_mesh(jax.devices()[:4]))
    found = jax.jit(jax.vmap(queued, (0, None, 0)))(factors, frozen, batches)
    padded = jax.vmap(jax.value_and_grad(loss_fn), (0, None, 0))
    close(found, jax.jit(padded)(factors, frozen, batches), atol=5e-6)  # of up to 1
    assert all(not np.any(x[3]) for x in jax.tree.leaves(found))


def test_the_reference_has_no_dropout(federation):
    batch = Batch(*(x[0] for x in federation.batches))
    factors = moved(federation.adapter, 1)
    rng = np.random.default_rng(0)
    drawn = rng.integers(2**32, size=(2, *batch.mask.shape), dtype="uint32")

    @jax.jit
    def mean(noise):
        noisy, frozen = NoisyBatch(**batch._asdict(), noise=noise), Frozen(federation.base, factors)
        return ReferenceLoss(MODEL, lambda tokens: tokens.reference_nll())(factors, frozen, noisy)

    quiet = PackedLoss(Decoder(tiny_config(), LORA.scale))
    expected = float(jax.jit(lambda *inputs: quiet(*inputs))(factors, federation.base, batch))
    for noise in drawn:
        assert float(mean(noise)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["constrained_sft", "kl_start"])
@pytest.mark.parametrize("reference", referenced_algorithms.REFERENCES)
def test_the_reference_is_the_whole_global_model_or_the_base(monkeypatch, name, reference):
    """With a loss that draws factors to the reference; the client's own start is a part of it."""

    def drawn(model, of_tokens):
        def loss(factors, frozen, batch):
            target = frozen.base if frozen.reference is None else frozen.reference
            return 0.5 * jnp.sum(jnp.square(factors["a"] - target["a"]))

        return loss

    monkeypatch.setattr(referenced_algorithms, "ReferenceLoss", drawn)
    training = LocalTraining(PackedLoss(MODEL), optax.sgd(1.0))
    method = algorithms.make(name, training, 2, Hyperparameters(reference=reference))
    whole, base = {"a": jnp.arange(1.0, 5.0)}, {"a": jnp.full(4, 9.0)}
    start = {"a": whole["a"] * jnp.array([1, 1, 0, 0])}
    blank = Batch(*(np.ones((1, 1, 4), np.float32) for _ in Batch._fields))
    update, _, _ = method.client_update(
        ServerState(whole, (), ()), (), start, base, blank, LocalSteps(jnp.array([0.5]))
    )
    target = {"global": whole, "base": base}[reference]["a"]
    np.testing.assert_allclose(update.delta["a"], 0.5 * (target - start["a"]))


def test_algorithms_are_built_without_a_model():
    """As where only the shapes of a run's state are asked for."""
    for name in ("constrained_sft", "kl_start"):
        method = algorithms.make(name, LocalTraining(None, None), 2)
        assert method.queued and method.init({"a": jnp.ones(2)}).factors["a"].shape == (2,)
