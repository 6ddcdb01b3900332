"""The chunked loss against the plain formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from fedsafe_jax.data.packing import Batch
from fedsafe_jax.models import lora, loss
from fedsafe_jax.models.decoder import Decoder
from fedsafe_jax.models.microbatch import MICROBATCH_TOKENS, value_and_grad_in_microbatches


def tiny_model():
    model, blank = Decoder(tiny_config()), jnp.zeros((1, 4), jnp.int32)
    return model, model.init(jax.random.key(0), blank, blank, blank)["params"]


def test_chunked_nll_and_gradient_equal_the_plain_formula(monkeypatch):
    monkeypatch.setitem(loss.CHUNK_TOKENS, "cpu", 8)  # several chunks, one of them without targets
    model, params = tiny_model()
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(3, 13, 32)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 97, (3, 13)), jnp.int32)
    mask = jnp.asarray(rng.random((3, 13)) < 0.4, jnp.float32)

    def ours(h):
        return (loss.token_nll(model, params, h, targets, mask) ** 2).sum()

    def plain(h):
        logits = h @ params["embed_tokens"].T
        log_p = jax.nn.log_softmax(logits)
        nll = -jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
        return ((nll * mask) ** 2).sum()

    # float32 sums over 97 logits in another order.
    np.testing.assert_allclose(ours(hidden), plain(hidden), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(ours)(hidden), jax.grad(plain)(hidden), atol=1e-4)


def test_clients_under_vmap_and_a_trainable_base(monkeypatch):
    monkeypatch.setitem(loss.CHUNK_TOKENS, "cpu", 8)
    model, params = tiny_model()
    rng = np.random.default_rng(1)
    hidden = jnp.asarray(rng.normal(size=(3, 2, 11, 32)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 97, (3, 2, 11)), jnp.int32)
    mask = jnp.asarray(rng.random((3, 2, 11)) < [[[0.1]], [[0.9]], [[0.0]]], jnp.float32)

    def total(params, h, t, m):
        return (loss.token_nll(model, params, h, t, m) ** 2).sum()

    def plain(params, h, t, m):
        log_p = jax.nn.log_softmax(h @ params["embed_tokens"].T)
        return ((-jnp.take_along_axis(log_p, t[..., None], -1)[..., 0] * m) ** 2).sum()

    both = [jax.value_and_grad(f, (0, 1)) for f in (total, plain)]
    for axes in ((None, 0, 0, 0), (0, 0, 0, 0)):
        base = params if axes[0] is None else jax.tree.map(lambda x: jnp.stack([x] * 3), params)
        actual, expected = (jax.vmap(f, axes)(base, hidden, targets, mask) for f in both)
        # float32 sums over 97 logits and 22 tokens in another order.
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-4), actual, expected
        )
        actual, expected = (
            jax.vmap(jax.grad(f, 1), axes)(base, hidden, targets, mask) for f in (total, plain)
        )
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("tokens", [None, 16, 64])
def test_a_weight_on_all_tokens_scales_the_gradient(monkeypatch, tokens):
    """A microbatch of all rows off the sparse path, of one row, and of all rows on it."""
    monkeypatch.setitem(MICROBATCH_TOKENS, "cpu", tokens or 1)
    model, params = tiny_model()
    config = lora.LoraConfig(2, 4.0, ("q_proj", "v_proj"))
    factors = lora.init(jax.random.key(1), model.config, config)
    rng, shape = np.random.default_rng(3), (4, 16)
    mask = (rng.random(shape) < 0.6).astype(np.float32)
    mask[1] = 0  # a masked pair
    whole = Batch(
        rng.integers(0, 97, shape).astype(np.int32), rng.integers(0, 97, shape).astype(np.int32),
        mask, segment_ids=np.ones(shape, np.int32),
        positions=np.broadcast_to(np.arange(16, dtype=np.int32), shape),
    )  # fmt: skip

    def loss_fn(factors, base, batch):
        return loss.packed_loss(model, factors, base, batch)

    run = jax.jit(
        value_and_grad_in_microbatches(loss_fn) if tokens == 16 else jax.value_and_grad(loss_fn)
    )

    def length(tree):
        return float(np.sqrt(sum(float(jnp.sum(jnp.square(x))) for x in jax.tree.leaves(tree))))

    value, gradient = run(factors, params, whole)
    small, small_gradient = run(factors, params, whole._replace(mask=mask * np.float32(0.05)))
    assert length(gradient) > 1e-3
    np.testing.assert_allclose(float(small), 0.05 * float(value), rtol=1e-5)
    np.testing.assert_allclose(length(small_gradient), 0.05 * length(gradient), rtol=1e-5)
    # Pairs of different weights: each token's loss times its weight, over the number of tokens.
    weights = np.array([1.0, 1.0, 0.5, 0.1], np.float32)[:, None]
    logits = model.apply(
        {"params": params, "lora": factors}, whole.tokens, whole.positions, whole.segment_ids,
        method="logits",
    )  # fmt: skip
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    nll = -np.take_along_axis(log_p, whole.targets[..., None], -1)[..., 0]
    mixed, _ = run(factors, params, whole._replace(mask=mask * weights))
    np.testing.assert_allclose(float(mixed), (nll * mask * weights).sum() / mask.sum(), rtol=1e-5)
    np.testing.assert_allclose(float(value), (nll * mask).sum() / mask.sum(), rtol=1e-5)


def test_masked_mean_counts_places_and_not_weights():
    values, weights = np.array([1.0, 2.0, 4.0], np.float32), np.array([0.5, 0.5, 0], np.float32)
    assert float(loss.masked_mean(values, weights)) == 0.75
    assert float(loss.masked_mean(values, weights > 0)) == 1.5
    assert float(loss.masked_mean(values, 0 * weights)) == 0


def test_divergence_from_a_reference_equals_torch(monkeypatch):
    """KL(reference || model) over the places of targets: value, and gradient by the factors."""
    torch = pytest.importorskip("torch")
    monkeypatch.setitem(loss.CHUNK_TOKENS, "cpu", 8)
    model, params = tiny_model()
    shape = lora.LoraConfig(2, 4.0, ("q_proj", "down_proj"))
    model = Decoder(model.config, shape.scale)
    factors, reference = (
        jax.tree.map(
            lambda x, i=i: x + 0.1 * jax.random.normal(jax.random.key(i), x.shape),
            lora.init(jax.random.key(i), model.config, shape),
        )
        for i in (1, 2)
    )
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 97, (2, 12)), jnp.int32)
    places = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32), (2, 12))
    mask = jnp.asarray(rng.random((2, 12)) < 0.5, jnp.float32)
    batch = Batch(tokens, tokens, positions=places, segment_ids=jnp.ones_like(tokens), mask=mask)

    def logits_of(factors):
        lora_of = {} if factors is None else {"lora": factors}
        rows = batch.tokens, batch.positions, batch.segment_ids
        hidden, _ = model.apply({"params": params} | lora_of, *rows)
        return model.apply({"params": params}, hidden, method="unembed")

    for fixed in (reference, None):
        value, gradient = jax.value_and_grad(
            lambda f, fixed=fixed: loss.packed_divergence(model, fixed, f, params, batch)
        )(factors)
        logits, pull_back = jax.vjp(logits_of, factors)
        ours = torch.tensor(np.asarray(logits), dtype=torch.float64, requires_grad=True)
        theirs = torch.tensor(np.asarray(logits_of(fixed)), dtype=torch.float64)
        on = torch.tensor(np.asarray(mask)) > 0
        expected = torch.nn.functional.kl_div(
            ours.log_softmax(-1)[on], theirs.log_softmax(-1)[on], log_target=True, reduction="sum"
        ) / int(on.sum())
        expected.backward()
        # float32 differences of log-probabilities near each other, against float64.
        assert float(value) == pytest.approx(expected.item(), rel=1e-4)
        (by_torch,) = pull_back(jnp.asarray(ours.grad.numpy(), jnp.float32))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), gradient, by_torch)
    same = loss.packed_divergence(model, factors, factors, params, batch)
    assert abs(float(same)) < 1e-6
