"""The last layer for target tokens alone against the last layer for all tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import COMMON, FAMILIES

from fedsafe_jax.data.packing import Batch
from fedsafe_jax.models import hub, lora, loss, sparse_last_layer
from fedsafe_jax.models.decoder import Decoder, param_shapes
from fedsafe_jax.models.decoder_config import from_hf
from fedsafe_jax.models.quantize import quantize

ROWS, SEQ = 2, 24


def family(name, **changes):
    """A model, its base and LoRA factors of all projections, none of them zero."""
    model_type, own = FAMILIES[name]
    config = from_hf(hub.hf_config({"model_type": model_type} | COMMON | own), "float32")
    config = dataclasses.replace(config, **changes)
    rng = np.random.default_rng(0)
    base = jax.tree.map(
        lambda x: jnp.asarray(0.15 * rng.normal(size=x.shape) + 0.2 * (len(x.shape) < 3), x.dtype),
        param_shapes(config),
    )
    factors = lora.init(
        jax.random.key(1), config, lora.LoraConfig(2, 4.0, lora.expand_targets("all-linear"))
    )
    return Decoder(config, 2.0), base, jax.tree.map(lambda x: x + 0.05, factors)


def packed(target_share=0.4):
    """Two rows of three examples each and padding; examples are longer than the windows."""
    rng = np.random.default_rng(1)
    segments = np.zeros((ROWS, SEQ), np.int32)
    positions = np.zeros((ROWS, SEQ), np.int32)
    for row, lengths in enumerate(((12, 3, 5), (2, 10, 11))):
        start = 0
        for i, length in enumerate(lengths):
            segments[row, start : start + length] = i + 1
            positions[row, start : start + length] = np.arange(length)
            start += length
    tokens, targets = rng.integers(0, 97, (2, ROWS, SEQ)).astype(np.int32)
    mask = ((rng.random((ROWS, SEQ)) < target_share) & (segments > 0)).astype(np.float32)
    return Batch(tokens, targets, mask, segment_ids=segments, positions=positions)


def plain_loss(model, factors, base, batch):
    variables = {"params": base, "lora": factors}
    rows = batch.tokens, batch.positions, batch.segment_ids
    log_p = jax.nn.log_softmax(model.apply(variables, *rows, method="logits"))
    nll = -jnp.take_along_axis(log_p, batch.targets[..., None], -1)[..., 0]
    return jnp.sum(nll * batch.mask) / jnp.maximum(jnp.sum(batch.mask), 1)


OURS, PLAIN = (
    jax.jit(jax.value_and_grad(f, argnums=1), static_argnums=0)
    for f in (loss.packed_loss, plain_loss)
)


def assert_same(model, base, factors, batch):
    actual, expected = (f(model, factors, base, batch) for f in (OURS, PLAIN))
    # float32 sums over a few hundred terms in another order, three layers deep.
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-5)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected[1]))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * largest),
        actual[1],
        expected[1],
    )
    return actual


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    monkeypatch.setattr(sparse_last_layer, "CHUNK_TOKENS", 8)


# Biases, one window for all, layers without positions, norms of heads, soft caps, two tables.
@pytest.mark.parametrize(
    "name", ["llama-biased", "mistral", "smollm3", "qwen3", "gemma2", "gemma3"]
)
def test_families(name):
    model, base, factors = family(name)
    value, gradient = assert_same(model, base, factors, packed())
    assert value > 1 and all(jnp.abs(x).max() > 0 for x in jax.tree.leaves(gradient))


@pytest.mark.parametrize("target_share", [0.0, 0.04, 1.0])
def test_any_number_of_target_tokens(target_share):
    model, base, factors = family("smollm2")
    batch = packed(target_share)
    value, _ = assert_same(model, base, factors, batch)
    assert (value == 0) == (batch.mask.sum() == 0)


def test_clients_under_vmap_and_the_value_alone():
    model, base, factors = family("smollm2")
    client_factors = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x, -x]), factors)
    batches = jax.tree.map(lambda *x: np.stack(x), *(packed(share) for share in (0.9, 0.1, 0.0)))
    for wanted in (jax.value_and_grad, lambda f: f):
        actual, expected = (
            jax.jit(jax.vmap(wanted(lambda a, b, f=f: f(model, a, base, b))))(
                client_factors, batches
            )
            for f in (loss.packed_loss, plain_loss)
        )
        jax.tree.map(
            # As above; gradients here are below 1.
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
            actual,
            expected,
        )


def test_recomputed_layers_quantized_and_narrow_bases():
    model, base, factors = family("llama3.1", remat=True)
    assert_same(model, base, factors, packed())

    def small(path, leaf):
        return quantize(leaf, "int8") if path[-1].key == "kernel" else leaf

    quantized = jax.tree_util.tree_map_with_path(small, base)
    assert_same(model, quantized, factors, packed())

    model, _, _ = family("llama3.1", dtype="bfloat16")
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    value, gradient = OURS(model, factors, base, packed())
    # bfloat16 keeps 8 bits: 0.4% a rounding, of logits up to 3.
    np.testing.assert_allclose(value, PLAIN(model, factors, base, packed())[0], rtol=1e-2)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(gradient))


def test_a_trainable_base_is_refused():
    model, base, factors = family("smollm2")
    with pytest.raises(TypeError, match="the base is frozen here; use token_nll"):
        jax.grad(lambda b: loss.packed_loss(model, factors, b, packed()))(base)
