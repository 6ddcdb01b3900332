"""Gradients in microbatches against the gradient of all rows at once."""

import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from fedsafe_jax.data.packing import Batch
from fedsafe_jax.models import lora, loss, microbatch
from fedsafe_jax.models.decoder import Decoder


@pytest.mark.parametrize("filled", [0, 1, 3, 5])
def test_microbatches_equal_all_rows_at_once(monkeypatch, filled):
    monkeypatch.setitem(microbatch.MICROBATCH_TOKENS, "cpu", 16)  # two rows a microbatch
    model, blank = Decoder(tiny_config()), jnp.zeros((1, 4), jnp.int32)
    base = model.init(jax.random.key(0), blank, blank, blank)["params"]
    config = lora.LoraConfig(2, 4.0, ("q_proj", "v_proj"))
    factors = jax.tree.map(lambda x: x + 0.05, lora.init(jax.random.key(1), model.config, config))
    rng = np.random.default_rng(0)
    used = np.arange(5)[:, None] < filled
    batch = Batch(
        tokens=rng.integers(0, 97, (5, 8)).astype(np.int32),
        targets=rng.integers(0, 97, (5, 8)).astype(np.int32),
        mask=(used * rng.choice([0.0, 0.3, 1.0], (5, 8))).astype(np.float32),
        segment_ids=(used * np.ones((5, 8))).astype(np.int32),
        positions=np.tile(np.arange(8, dtype=np.int32), (5, 1)),
    )

    def loss_fn(factors, base, batch):
        return loss.packed_loss(model, factors, base, batch)

    value, gradient = jax.jit(microbatch.value_and_grad_in_microbatches(loss_fn))(
        factors, base, batch
    )
    expected = jax.jit(jax.value_and_grad(loss_fn))(factors, base, batch)
    # float32 sums over rows in another order.
    np.testing.assert_allclose(value, expected[0], rtol=1e-5, atol=1e-7)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), gradient, expected[1]
    )


def test_an_option_that_the_compiler_does_not_know_is_left_out(monkeypatch):
    microbatch.compiler_options.cache_clear()
    # jaxlib 0.11 has the newer code generator alone.
    is_known = importlib.metadata.version("jaxlib").startswith("0.10.")
    assert microbatch.compiler_options("cpu") == (microbatch.CPU_OPTIONS if is_known else None)
    microbatch.compiler_options.cache_clear()
    monkeypatch.setattr(microbatch, "CPU_OPTIONS", {"xla_cpu_no_such_option": False})
    assert microbatch.compiler_options("cpu") is None
    microbatch.compiler_options.cache_clear()
