"""The last layer for learned tokens alone against all of it for all tokens."""

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
    """A model, its base and an adapter of all projections, none of them zero."""
    model_type, own = FAMILIES[name]
    config = from_hf(hub.hf_config({"model_type": model_type} | COMMON | own), "float32")
    config = dataclasses.replace(config, **changes)
    rng = np.random.default_rng(0)
    base = jax.tree.map(
        lambda x: jnp.asarray(0.15 * rng.normal(size=x.shape) + 0.2 * (len(x.shape) < 3), x.dtype),
        param_shapes(config),
    )
    adapter = lora.init(
        jax.random.key(1), config, lora.LoraConfig(2, 4.0, lora.expand_targets("all-linear"))
    )
    return Decoder(config, 2.0), base, jax.tree.map(lambda x: x + 0.05, adapter)


def packed(learned=0.4):
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
    mask = ((rng.random((ROWS, SEQ)) < learned) & (segments > 0)).astype(np.float32)
    return Batch(tokens, targets, mask, segment_ids=segments, positions=positions)


def plain_loss(model, adapter, base, batch):
    variables = {"params": base, "lora": adapter}
    rows = batch.tokens, batch.positions, batch.segment_ids
    log_p = jax.nn.log_softmax(model.apply(variables, *rows, method="logits"))
    nll = -jnp.take_along_axis(log_p, batch.targets[..., None], -1)[..., 0]
    return jnp.sum(nll * batch.mask) / jnp.maximum(jnp.sum(batch.mask), 1)


OURS, PLAIN = (
    jax.jit(jax.value_and_grad(f, argnums=1), static_argnums=0)
    for f in (loss.packed_loss, plain_loss)
)


def assert_same(model, base, adapter, batch):
    found, expected = (f(model, adapter, base, batch) for f in (OURS, PLAIN))
    # float32 sums over a few hundred terms in another order, three layers deep.
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected[1]))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * largest),
        found[1],
        expected[1],
    )
    return found


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    monkeypatch.setattr(sparse_last_layer, "CHUNK_TOKENS", 8)
    sparse_last_layer._last.cache_clear()
    yield
    sparse_last_layer._last.cache_clear()


# Biases, one window for all, layers without positions, norms of heads, soft caps, two tables.
@pytest.mark.parametrize(
    "name", ["llama-biased", "mistral", "smollm3", "qwen3", "gemma2", "gemma3"]
)
def test_families(name):
    model, base, adapter = family(name)
    value, gradient = assert_same(model, base, adapter, packed())
    assert value > 1 and all(jnp.abs(x).max() > 0 for x in jax.tree.leaves(gradient))


@pytest.mark.parametrize("learned", [0.0, 0.04, 1.0])
def test_any_number_of_learned_tokens(learned):
    model, base, adapter = family("smollm2")
    batch = packed(learned)
    value, _ = assert_same(model, base, adapter, batch)
    assert (value == 0) == (batch.mask.sum() == 0)


def test_clients_under_vmap_and_the_value_alone():
    model, base, adapter = family("smollm2")
    many = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x, -x]), adapter)
    batches = jax.tree.map(lambda *x: np.stack(x), *(packed(share) for share in (0.9, 0.1, 0.0)))
    for wanted in (jax.value_and_grad, lambda f: f):
        found, expected = (
            jax.jit(jax.vmap(wanted(lambda a, b, f=f: f(model, a, base, b))))(many, batches)
            for f in (loss.packed_loss, plain_loss)
        )
        jax.tree.map(
            # As above; gradients here are below 1.
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
            found,
            expected,
        )


def test_recomputed_layers_quantized_and_narrow_bases():
    model, base, adapter = family("llama3.1", remat=True)
    assert_same(model, base, adapter, packed())

    def small(path, leaf):
        return quantize(leaf, "int8") if path[-1].key == "kernel" else leaf

    quantized = jax.tree_util.tree_map_with_path(small, base)
    assert_same(model, quantized, adapter, packed())

    model, _, _ = family("llama3.1", dtype="bfloat16")
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    value, gradient = OURS(model, adapter, base, packed())
    # bfloat16 keeps 8 bits: 0.4% a rounding, of logits up to 3.
    np.testing.assert_allclose(value, PLAIN(model, adapter, base, packed())[0], rtol=1e-2)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(gradient))


def test_a_base_that_learns_is_refused():
    model, base, adapter = family("smollm2")
    with pytest.raises(TypeError, match="the base is frozen here; use token_nll"):
        jax.grad(lambda b: loss.packed_loss(model, adapter, b, packed()))(base)
