"""Quantisation against numpy, and training of adapters over a quantised base."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedsafe_jax.models import lora, loss, quantize
from fedsafe_jax.models.decoder_config import ModelError


def kernel(shape=(2, 128, 24)):
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    values[0, :, 3] = 0.0  # a column without a scale
    return values


def test_int8_equals_rounding_by_column():
    values = kernel()
    scale = np.abs(values).max(1, keepdims=True) / 127
    safe = np.where(scale == 0, 1, scale)
    expected = np.round(values / safe) * scale
    quantized = quantize.quantize(values, "int8")
    assert quantized.codes.dtype == jnp.int8
    np.testing.assert_allclose(quantize.dequantize(quantized, jnp.float32), expected, atol=1e-6)
    x = np.random.default_rng(1).normal(size=(5, 128)).astype(np.float32)
    layer = jax.tree.map(lambda a: a[1], quantized)
    # A product of 128 terms, scaled after instead of before the sum.
    np.testing.assert_allclose(quantize.matmul(x, layer), x @ expected[1], atol=1e-4)


def test_nf4_takes_the_nearest_of_the_published_levels():
    values = kernel()
    blocks = values.reshape(2, 2, 64, 24)
    scale = np.abs(blocks).max(2, keepdims=True)
    unit = blocks / np.where(scale == 0, 1, scale)
    nearest = np.abs(unit[..., None] - quantize.NF4_LEVELS).argmin(-1)
    expected = (quantize.NF4_LEVELS[nearest] * scale).reshape(values.shape)
    quantized = quantize.quantize(values, "nf4")
    assert quantized.codes.shape == (2, 64, 24) and quantized.codes.dtype == jnp.uint8
    np.testing.assert_allclose(quantize.dequantize(quantized, jnp.float32), expected, atol=1e-6)
    with pytest.raises(ModelError, match="'nf4': input size 72 is no multiple of 64; use int8"):
        quantize.quantize(np.zeros((72, 8), np.float32), "nf4")


def test_nf4_levels_are_those_of_the_qlora_paper():
    # Equation 4: means of neighbouring quantiles of the normal, 8 to the negative side and 9 to the
    # positive (the shared zero left out once), normalised to 1.
    import scipy.stats

    offset = 0.5 * ((1 - 1 / 30) + (1 - 1 / 32))
    positive = scipy.stats.norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -scipy.stats.norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate([positive, [0.0], negative]))
    # The published table was computed in float32 from rounded quantiles.
    np.testing.assert_allclose(quantize.NF4_LEVELS, levels / levels.max(), atol=1e-3)


@pytest.mark.parametrize(("kind", "smaller", "error"), [("int8", 3.8, 0.3), ("nf4", 7.0, 3.0)])
def test_adapters_train_under_vmap_over_a_quantised_base(packaged, kind, smaller, error):
    base = quantize.quantize_params(packaged.params, kind)
    kernels = quantize.num_bytes(packaged.params["layers"])
    assert kernels / quantize.num_bytes(base["layers"]) > smaller
    tokens = np.random.default_rng(0).integers(0, packaged.config.vocab_size, (2, 1, 16))
    from fedsafe_jax.data.packing import Batch

    ones = np.ones(tokens.shape, np.int32)
    positions = np.broadcast_to(np.arange(16), tokens.shape)
    batch = Batch(
        tokens,
        np.roll(tokens, -1, -1),
        ones.astype(np.float32),
        segment_ids=ones,
        positions=positions,
    )
    config = lora.LoraConfig(4, 8.0, lora.expand_targets("all-linear"))
    fresh = lora.init(jax.random.key(0), packaged.config, config)
    client_factors = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), fresh)

    def loss_fn(factors, base, batch):
        return loss.packed_loss(packaged.model, factors, base, batch)

    gradient = jax.jit(jax.vmap(jax.value_and_grad(loss_fn), (0, None, 0)))
    exact, exact_grads = gradient(client_factors, packaged.params, batch)
    rough, rough_grads = gradient(client_factors, base, batch)
    np.testing.assert_allclose(rough, exact, atol=error)
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(rough_grads))
    exact_grads, rough_grads = (
        np.concatenate([np.ravel(g) for g in jax.tree.leaves(tree)])
        for tree in (exact_grads, rough_grads)
    )
    norms = np.linalg.norm(exact_grads) * np.linalg.norm(rough_grads)
    assert exact_grads @ rough_grads / norms > 0.8
