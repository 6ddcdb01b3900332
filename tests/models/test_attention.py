"""Attention backends against each other and against a plain formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedsafe_jax.models import attention, block_attention
from fedsafe_jax.models.attention import Visibility

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
        for q in range(SEQ):
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
    # The TPU kernel, interpreted; it sums blocks in another order.
    out = attention.splash(
        query,
        key,
        value,
        segments=jnp.asarray(segments),
        window=window,
        scale=scale,
        softcap=softcap,
    )
    np.testing.assert_allclose(np.asarray(out)[real], expected[real], atol=1e-4)


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


@pytest.mark.parametrize(
    ("platform", "dtype", "lengths", "head_dim", "softcap", "expected"),
    [
        ("cpu", "bfloat16", (128, 128), 128, None, "xla"),
        ("cpu", "bfloat16", (256, 256), 128, 50.0, "blocks"),
        ("cpu", "float32", (1, 256), 128, None, "xla"),
        ("gpu", "bfloat16", (256, 256), 128, None, "cudnn"),
        ("gpu", "float32", (256, 256), 128, None, "xla"),
        ("gpu", "bfloat16", (256, 256), 128, 50.0, "xla"),
        ("gpu", "bfloat16", (256, 256), 256, None, "xla"),
        ("gpu", "bfloat16", (1, 256), 128, None, "xla"),
        ("tpu", "bfloat16", (256, 256), 128, 50.0, "splash"),
        ("tpu", "bfloat16", (100, 100), 128, None, "xla"),
        ("tpu", "bfloat16", (256, 256), 64, None, "xla"),
    ],
)
def test_choice_of_backend(monkeypatch, platform, dtype, lengths, head_dim, softcap, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    q_len, kv_len = lengths
    chosen = attention.choose_backend(
        "auto", q_len=q_len, kv_len=kv_len, head_dim=head_dim, dtype=dtype, softcap=softcap
    )
    assert chosen == expected
