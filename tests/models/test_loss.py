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
