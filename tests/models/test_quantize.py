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


@pytest.mark.parametrize("kind", quantize.KINDS)
def test_layers_are_quantised_as_if_alone(kind):
    values = kernel((2, 3, 128, 24))
    stacked = quantize.quantize(values, kind)
    for index in np.ndindex(2, 3):
        alone = quantize.quantize(values[index], kind)
        one = jax.tree.map(lambda leaf, index=index: leaf[index], stacked)
        jax.tree.map(np.testing.assert_array_equal, one, alone)


def test_nf4_rounds_one_layer_at_a_time():
    shape = jax.ShapeDtypeStruct((16, 256, 512), jnp.float32)
    compiled = quantize.quantize.lower(shape, kind="nf4").compile()
    layer = 4 * 256 * 512
    # A few float32 and int32 copies of a layer; of all layers at once they would be 16 times that.
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * layer


@pytest.mark.parametrize("kind", quantize.KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_reaches_the_inputs_of_all_clients(kind, dtype):
    layer = quantize.quantize(kernel()[1], kind)
    x, pull = (
        jnp.asarray(np.random.default_rng(i).normal(size=(3, 5, width)), dtype)
        for i, width in ((1, 128), (2, 24))
    )

    def gradient(x, pull):
        return jax.vjp(lambda x: quantize.matmul(x, layer), x)[1](pull)[0]

    mapped = jax.jit(jax.vmap(gradient))(x, pull)
    assert mapped.dtype == x.dtype
    expanded = np.asarray(quantize.dequantize(layer, jnp.float32), np.float64)
    expected = np.asarray(pull, np.float64) @ expanded.T
    # Of numbers near 10, bfloat16 keeps 8 bits; int8 scales round once more there.
    tolerance = 1e-4 if dtype == "float32" else 0.15
    np.testing.assert_allclose(np.asarray(mapped, np.float64), expected, atol=tolerance)


@pytest.mark.parametrize("kind", quantize.KINDS)
def test_the_backward_pass_keeps_codes_and_no_expanded_kernels(kind):
    stacked = quantize.quantize(kernel((4, 128, 128)), kind)
    x = jnp.ones((2, 128))

    def layers(x):
        return jax.lax.scan(lambda h, layer: (quantize.matmul(h, layer), None), x, stacked)[0]

    _, backward = jax.vjp(layers, x)
    kept = quantize.num_bytes(jax.tree.leaves(backward))
    assert kept <= quantize.num_bytes(stacked) < 4 * 128 * 128 * 4


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
