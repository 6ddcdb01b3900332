"""The chunked loss against the plain formula."""

import jax
import jax.numpy as jnp
import numpy as np
from tiny import tiny_config

from fedsafe_jax.models import loss
from fedsafe_jax.models.decoder import Decoder


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
