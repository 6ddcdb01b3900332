"""Attention backends against each other and against a plain formula."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from fedsafe_jax.models import attention, block_attention
from fedsafe_jax.models import attention_kernels as kernels
from fedsafe_jax.models.decoder_config import ModelError
from fedsafe_jax.models.visibility import Visibility

SEQ, HEADS, KV_HEADS, HEAD_DIM = 256, 4, 2, 128


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)

    def draw(heads):
        return rng.normal(size=(2, SEQ, heads, HEAD_DIM)).astype(np.float32)

    segments = np.zeros((2, SEQ), np.int32)
    segments[0, :100], segments[0, 100:250] = 1, 2
    segments[1, :30], segments[1, 30:31], segments[1, 31:] = 1, 2, 3
    return draw(HEADS), draw(KV_HEADS), draw(KV_HEADS), segments


def plain(query, key, value, segments, window, scale, softcap):
    """One query at a time, in float64."""
    out = np.zeros(query.shape)
    for b in range(len(query)):
        for q in range(query.shape[1]):
            first = max(0, q - window + 1) if window else 0
            visible = [k for k in range(first, q + 1) if segments[b, k] == segments[b, q]]
            for h in range(HEADS):
                kv = h // (HEADS // KV_HEADS)
                logits = scale * key[b, visible, kv].astype(float) @ query[b, q, h]
                if softcap:
                    logits = softcap * np.tanh(logits / softcap)
                weights = np.exp(logits - logits.max())
                out[b, q, h] = weights @ value[b, visible, kv] / weights.sum()
    return out


@pytest.mark.parametrize(("window", "softcap"), [(0, None), (50, None), (50, 4.0)])
def test_backends_equal_the_formula(arrays, window, softcap):
    query, key, value, segments = arrays
    scale = HEAD_DIM**-0.5
    expected = plain(
        query, key, value, segments=segments, window=window, scale=scale, softcap=softcap
    )
    real = segments > 0
    mask = Visibility(segments, segments, jnp.arange(segments.shape[1])).mask(window)
    out = attention.attend(query, key, value, mask=mask, scale=scale, softcap=softcap)
    # float32 sums over at most 256 keys.
    np.testing.assert_allclose(np.asarray(out)[real], expected[real], atol=1e-5)
    out = block_attention.attend(
        query,
        key,
        value,
        segments=jnp.asarray(segments),
        window=window,
        scale=scale,
        softcap=softcap,
    )
    np.testing.assert_allclose(np.asarray(out)[real], expected[real], atol=1e-5)


# What each kernel computes: Triton's has no windows, splash alone a cap.
CASES = [
    ("triton", 0, None),
    ("cudnn", 0, None),
    ("cudnn", 50, None),
    ("packed", 0, None),
    ("packed", 50, None),
    ("splash", 0, None),
    ("splash", 50, 4.0),
    ("blocks", 0, None),
    ("blocks", 50, 4.0),
    ("xla", 0, None),
    ("xla", 50, 4.0),
]


@pytest.mark.parametrize(("name", "window", "softcap"), CASES)
def test_kernels_equal_the_formula_for_clients_under_vmap_with_gradients(
    arrays, name, window, softcap
):
    """Interpreted, or for cuDNN emulated from the very bias or bounds that it gets."""
    clients = [np.stack([x, x[::-1]])[..., :128, :, :64] for x in arrays[:3]]
    segments = np.stack([arrays[3], arrays[3][::-1]])[..., :128]
    weights = np.random.default_rng(1).normal(size=clients[0].shape)
    scale = 64**-0.5

    def attend(query, key, value, segments):
        if name == "xla":
            mask = Visibility.in_rows(segments).mask(window)
            return attention.attend(query, key, value, mask=mask, scale=scale, softcap=softcap)
        static = {"segments": segments, "window": window, "scale": scale, "softcap": softcap}
        if name == "blocks":
            return block_attention.attend(query, key, value, **static)
        return kernels.attend(name, query, key, value=value, **static, interpret=True)

    def loss(query, key, value, segments, weights):
        return jnp.sum(weights * attend(query, key, value, segments))

    def formula(query, key, value, segments, weights):
        key, value = (jnp.repeat(x, 2, axis=2) for x in (key, value))
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) * scale
        scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
        slots = np.arange(segments.shape[1])
        is_near = (slots[None] <= slots[:, None]) & (
            slots[None] > slots[:, None] - (window or len(slots))
        )
        visible = (segments[:, None, :, None] == segments[:, None, None, :]) & is_near
        shares = jax.nn.softmax(jnp.where(visible, scores, -1e30), axis=-1)
        return jnp.sum(weights * jnp.einsum("bhqk,bkhd->bqhd", shares, value))

    single = [jnp.asarray(x, jnp.float32) for x in clients]
    step = jax.jit(jax.vmap(jax.value_and_grad(loss, (0, 1, 2))))
    value, gradients = step(*single, jnp.asarray(segments), jnp.asarray(weights, jnp.float32))
    with jax.enable_x64(True):
        exact = jax.vmap(jax.value_and_grad(formula, (0, 1, 2)))
        wide = [jnp.asarray(x, jnp.float64) for x in (*clients, weights)]
        expected, expected_gradients = exact(*wide[:3], jnp.asarray(segments), wide[3])
    # float32 sums of 65,536 products of normal numbers, and over at most 128 keys.
    np.testing.assert_allclose(value, expected, atol=2e-3)
    for gradient, right in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, right, atol=2e-5)


def test_a_row_with_more_segments_than_cudnn_keeps_apart_is_not_a_number():
    query = np.ones((2, 128, 2, 64), np.float32)
    segments = np.stack([np.arange(128) // 2, np.arange(128)]).astype(np.int32)
    out = kernels.attend(
        "packed", query, query, value=query, segments=segments, window=0, scale=1.0, interpret=True
    )
    assert np.isfinite(out[0]).all() and np.isnan(out[1]).all()
    lengths, offsets, fits = kernels.segment_bounds(jnp.asarray(segments[:, :8]), 5)
    assert lengths[0].tolist() == [2, 2, 2, 2, -1] and fits.tolist() == [True, False]
    assert offsets[0].tolist() == [0, 2, 4, 6, -1, -1]


def test_rows_that_are_no_multiple_of_a_kernels_block_are_padded(arrays):
    query, key, value, segments = (x[:, :100] for x in arrays)
    expected = plain(query, key, value, segments=segments, window=0, scale=0.1, softcap=None)
    for name in kernels.KERNELS:
        out = kernels.attend(
            name, query, key, value=value, segments=segments, window=0, scale=0.1, interpret=True
        )
        np.testing.assert_allclose(out, expected, atol=1e-4)  # float32 sums over 100 keys


def test_long_rows_in_parts_equal_the_formula_with_gradients(arrays, monkeypatch):
    monkeypatch.setattr(attention, "PART", 96)  # no divisor of the row
    query, key, value, segments = arrays
    mask = Visibility(segments, segments, jnp.arange(SEQ)).mask(50)

    def loss(attend, *inputs):
        return jnp.sum(jnp.sin(attend(*inputs, mask=mask, scale=0.1, softcap=4.0)))

    expected = jax.value_and_grad(lambda *x: loss(attention.attend, *x), (0, 1, 2))
    parts = jax.jit(jax.value_and_grad(lambda *x: loss(attention.attend_in_parts, *x), (0, 1, 2)))
    inputs = query, key, value
    for a, b in zip(
        jax.tree.leaves(parts(*inputs)), jax.tree.leaves(expected(*inputs)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("window", "softcap"), [(0, None), (50, None), (90, 4.0)])
def test_gradients_of_blocks_equal_those_of_xla(arrays, window, softcap):
    query, key, value, segments = arrays
    short = 200  # not a multiple of a block
    query, key, value, segments = (x[:, :short] for x in (query, key, value, segments))
    mask = Visibility(segments, segments, jnp.arange(segments.shape[1])).mask(window)
    real = (segments > 0)[..., None, None]

    def loss(attend, *inputs):
        return jnp.sum(jnp.square(attend(*inputs)) * real)

    def dense(q, k, v):
        return attention.attend(q, k, v, mask=mask, scale=0.1, softcap=softcap)

    def blocks(q, k, v):
        return block_attention.attend(
            q, k, v, segments=jnp.asarray(segments), window=window, scale=0.1, softcap=softcap
        )

    expected = jax.grad(lambda *x: loss(dense, *x), (0, 1, 2))(query, key, value)
    gradients = jax.jit(jax.grad(lambda *x: loss(blocks, *x), (0, 1, 2)))(query, key, value)
    for a, b in zip(gradients, expected, strict=True):
        # float32 sums over at most 200 keys, of terms up to about ten.
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_blocks_under_vmap_are_the_same_rows(arrays):
    query, key, value, segments = (np.stack([x, x[::-1]]) for x in arrays)

    def loss(q, k, v, s):
        return jnp.sum(jnp.sin(block_attention.attend(q, k, v, segments=s, window=0, scale=0.1)))

    each = jax.grad(loss, (0, 1, 2))
    together = jax.vmap(each)(query, key, value, segments)
    for i in range(2):
        alone = each(*(jnp.asarray(x[i]) for x in (query, key, value, segments)))
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_allclose(a[i], b, atol=1e-5)
    shared = jax.vmap(each, (0, None, None, None))(
        query, *(jnp.asarray(x[0]) for x in (key, value, segments))
    )
    np.testing.assert_allclose(shared[0][0], together[0][0], atol=1e-5)


class Devices:
    """A mesh of devices that are not there."""

    def __init__(self, platform, model=1):
        self.devices = np.array([types.SimpleNamespace(platform=platform)] * model)
        self.shape = {"clients": 1, "model": model}
        self.axis_names = ("clients", "model")
        self.size = model


def config_on(platform, model=1, **changes):
    fields = {"dtype": "bfloat16", "head_dim": 128, "num_heads": 4, "num_kv_heads": 2} | changes
    return tiny.tiny_config(mesh=Devices(platform, model), **fields)


GEMMA = {"window": 100, "windowed_layers": (0,)}


@pytest.mark.parametrize(
    ("platform", "lengths", "changes", "expected"),
    [
        ("cpu", (128, 128), {}, "xla"),
        ("cpu", (256, 256), {"attention_softcap": 50.0}, "blocks"),
        ("cpu", (1, 256), {}, "xla"),
        ("gpu", (256, 256), {}, "triton"),
        ("cuda", (100, 100), {"head_dim": 64}, "triton"),
        ("gpu", (256, 256), {"dtype": "float32"}, "xla"),
        ("gpu", (256, 256), {"attention_softcap": 50.0}, "xla"),
        ("gpu", (256, 256), {"head_dim": 256}, "cudnn"),
        ("gpu", (256, 256), GEMMA, "cudnn"),
        ("gpu", (100, 100), GEMMA, "triton"),
        ("gpu", (1, 256), {}, "xla"),
        ("tpu", (256, 256), {"attention_softcap": 50.0}, "splash"),
        ("tpu", (100, 100), {"head_dim": 64}, "splash"),
        ("tpu", (1, 256), {}, "xla"),
    ],
)
def test_choice_of_backend(platform, lengths, changes, expected):
    assert attention.choose_backend(config_on(platform, **changes), *lengths) == expected


@pytest.mark.parametrize(
    ("platform", "wanted", "changes", "message"),
    [
        (
            "cpu",
            "triton",
            {},
            "attention 'triton': it is a kernel for GPU, and the devices are cpu",
        ),
        ("gpu", "splash", {}, "it is a kernel for TPU, and the devices are gpu"),
        ("gpu", "triton", {"head_dim": 256}, "heads have 256 numbers.* up to 128"),
        ("gpu", "cudnn", {"dtype": "float32"}, "in bfloat16, and the model in float32"),
        ("gpu", "packed", {"attention_softcap": 50.0}, "no cap of attention logits"),
        ("gpu", "triton", GEMMA, "no sliding window"),
        ("gpu", "cudnn", {"model": 4}, "model_parallel=4 does not divide the 2 key-value heads"),
        ("tpu", "auto", {"model": 4}, "model_parallel=4 does not divide the model's 2 key-value"),
        ("tpu", "flash", {}, "attention 'flash': expected one of auto, xla, blocks, triton"),
    ],
)
def test_a_backend_that_cannot_compute_a_models_attention(platform, wanted, changes, message):
    config = config_on(platform, attention=wanted, **changes)
    with pytest.raises(ModelError, match=message):
        attention.choose_backend(config, 256, 256)
