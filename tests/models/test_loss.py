"""The chunked loss against the plain formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config

from fedsafe_jax.data.packing import Batch
from fedsafe_jax.models import lora, loss, microbatch
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


@pytest.mark.parametrize("filled", [0, 1, 3, 5])
def test_passes_equal_all_rows_at_once(monkeypatch, filled):
    monkeypatch.setitem(microbatch.MICROBATCH_TOKENS, "cpu", 16)  # two rows a pass
    model, base = tiny_model()
    config = lora.LoraConfig(2, 4.0, ("q_proj", "v_proj"))
    adapter = jax.tree.map(lambda x: x + 0.05, lora.init(jax.random.key(1), model.config, config))
    rng = np.random.default_rng(0)
    used = np.arange(5)[:, None] < filled
    batch = Batch(
        tokens=rng.integers(0, 97, (5, 8)).astype(np.int32),
        targets=rng.integers(0, 97, (5, 8)).astype(np.int32),
        mask=(used * rng.choice([0.0, 0.3, 1.0], (5, 8))).astype(np.float32),
        segment_ids=(used * np.ones((5, 8))).astype(np.int32),
        positions=np.tile(np.arange(8, dtype=np.int32), (5, 1)),
    )

    def loss_fn(adapter, base, batch):
        return loss.packed_loss(model, adapter, base, batch)

    value, gradient = jax.jit(microbatch.value_and_grad_in_microbatches(loss_fn))(
        adapter, base, batch
    )
    expected = jax.jit(jax.value_and_grad(loss_fn))(adapter, base, batch)
    # float32 sums over rows in another order.
    np.testing.assert_allclose(value, expected[0], rtol=1e-5, atol=1e-7)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), gradient, expected[1]
    )


def test_clients_in_one_line_and_a_learning_head(monkeypatch):
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
        found, expected = (jax.vmap(f, axes)(base, hidden, targets, mask) for f in both)
        # float32 sums over 97 logits and 22 tokens in another order.
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-4), found, expected
        )
        one, other = (
            jax.vmap(jax.grad(f, 1), axes)(base, hidden, targets, mask) for f in (total, plain)
        )
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-4)


def test_an_option_that_the_compiler_does_not_know_is_left_out(monkeypatch):
    microbatch.compiler_options.cache_clear()
    assert microbatch.compiler_options() == microbatch.CPU_OPTIONS
    microbatch.compiler_options.cache_clear()
    monkeypatch.setattr(microbatch, "CPU_OPTIONS", {"xla_cpu_no_such_option": False})
    assert microbatch.compiler_options() is None
    microbatch.compiler_options.cache_clear()
