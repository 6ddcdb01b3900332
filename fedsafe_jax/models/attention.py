"""Which tokens see which, rotary positions, and the choice of attention backend."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedsafe_jax.models import block_attention

BACKENDS = ("auto", "xla", "cudnn", "splash", "blocks")
SPLASH_BLOCK = 128  # sequences and heads must be multiples of it on TPU


class Visibility(NamedTuple):
    """Which keys a query may attend to: earlier ones (or itself) of its own segment.

    Padding is segment 0, and sees the padding before it, so that no softmax row is empty.
    """

    query_segments: jax.Array  # int32 [batch, q_len]
    key_segments: jax.Array  # int32 [batch, kv_len]
    slots: jax.Array  # int32 [q_len], of the queries among the keys

    def mask(self, window: int = 0) -> jax.Array:
        """bool `[batch, 1, q_len, kv_len]`; `window` > 0 hides keys that many slots back."""
        queries, keys = self.slots[:, None], jnp.arange(self.key_segments.shape[1])[None, :]
        near = keys <= queries
        if window:
            near &= keys > queries - window
        same = self.query_segments[:, :, None] == self.key_segments[:, None, :]
        return (same & near)[:, None]


def choose_backend(
    wanted: str, q_len: int, kv_len: int, head_dim: int, dtype, softcap: float | None
) -> str:
    """`cudnn` (flash) on GPU, `splash` on TPU, `blocks` on CPU, `xla` where those do not apply.

    Args:
      wanted: one of `BACKENDS`; any but `auto` is taken as it is.
      q_len, kv_len: lengths of queries and keys; where they differ, in decoding, XLA it is.
      head_dim: size of a head.
      dtype: of the query; cuDNN's flash attention has no float32.
      softcap: cap of attention logits, which cuDNN does not have.
    """
    if q_len != kv_len:
        return "xla"
    if wanted != "auto":
        return wanted
    platform = jax.default_backend()
    if platform == "gpu" and head_dim % 8 == 0 and head_dim <= 128 and not softcap:
        return "cudnn" if jnp.dtype(dtype).itemsize == 2 else "xla"
    if platform == "tpu" and q_len % SPLASH_BLOCK == 0 and head_dim % SPLASH_BLOCK == 0:
        return "splash"
    if platform == "cpu" and q_len >= block_attention.SHORTEST:
        return "blocks"
    return "xla"


def attend(query, key, value, mask, scale: float, softcap: float | None = None, backend="xla"):
    """Grouped-query scaled dot-product attention under a mask, by XLA or cuDNN.

    Args:
      query: `[batch, q_len, heads, head_dim]`.
      key, value: `[batch, kv_len, kv_heads, head_dim]`, `heads % kv_heads == 0`.
      mask: bool `[batch, 1, q_len, kv_len]`.
      scale: factor of the query-key products.
      softcap: `cap * tanh(logit / cap)` before the softmax, or None; XLA only.
      backend: `xla` or `cudnn`.

    Returns:
      `[batch, q_len, heads, head_dim]` in the dtype of `query`.
    """
    if backend == "cudnn":
        # A bias, as cuDNN fails on a mask alone (jax#28974).
        return jax.nn.dot_product_attention(
            query, key, value, bias=_bias(mask, query), scale=scale, implementation="cudnn"
        )
    return attend_cache(
        query, key.swapaxes(1, 2), value.swapaxes(1, 2), mask=mask, scale=scale, softcap=softcap
    )


def attend_cache(query, key, value, mask, scale: float, softcap: float | None = None):
    """`attend` by XLA, with keys and values `[batch, kv_heads, kv_len, head_dim]`.

    Heads lie outside positions, in the cache too: then each head's product reads one block of
    memory, which on CPU is three times as fast as with heads inside.
    """
    batch, q_len, heads, head_dim = query.shape
    kv_heads, kv_len = key.shape[1], key.shape[2]
    # Query heads of a group stand in line with their positions: one plain batched product.
    grouped = query.swapaxes(1, 2).reshape(batch, kv_heads, -1, head_dim)
    logits = jnp.einsum("bksd,bktd->bkst", grouped, key, preferred_element_type=jnp.float32)
    logits = logits.reshape(batch, kv_heads, -1, q_len, kv_len) * scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    logits = jnp.where(mask[:, :, None], logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    out = jnp.einsum("bkst,bktd->bksd", weights.reshape(batch, kv_heads, -1, kv_len), value)
    return out.reshape(batch, heads, q_len, head_dim).swapaxes(1, 2)


def _bias(mask, query):
    return jnp.where(mask, 0.0, jnp.finfo(query.dtype).min / 2).astype(query.dtype)


def splash(query, key, value, segments, window: int, scale: float, softcap: float | None):
    """TPU splash attention: blocks that the causal or window mask hides are never computed.

    Args:
      query, key, value: as in `attend`, with `q_len == kv_len`.
      segments: int32 `[batch, seq]`.
      window: as in `Visibility.mask`; static.
      scale: factor of the query-key products.
      softcap: cap of attention logits, or None.
    """
    # Pallas for TPU is imported only where it is used.
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    seq, heads = query.shape[1], query.shape[2]
    if window:
        one = kernels.LocalMask((seq, seq), window_size=(window - 1, 0), offset=0)
    else:
        one = kernels.CausalMask((seq, seq))
    kernel = kernels.make_splash_mha_single_device(
        kernels.MultiHeadMask([one] * heads),
        attn_logits_soft_cap=softcap,
        interpret=jax.default_backend() != "tpu",
    )
    by_head = [x.swapaxes(1, 2) for x in (query * scale, key, value)]
    out = jax.vmap(kernel)(*by_head, kernels.SegmentIds(segments, segments))
    return out.swapaxes(1, 2).astype(query.dtype)


# Backends that read segments instead of a mask.
SEGMENTED = {"splash": splash, "blocks": block_attention.attend}


def windows(config) -> tuple[int, ...]:
    """The windows that occur, 0 for none: of layers without first."""
    count = len(config.windowed_layers)
    if count in (0, config.num_layers):
        return (config.window if count else 0,)
    return (0, config.window)


def _backend(config, q_len: int, kv_len: int) -> str:
    return choose_backend(
        config.attention,
        q_len,
        kv_len,
        head_dim=config.head_dim,
        dtype=config.dtype,
        softcap=config.attention_softcap,
    )


def sight(config, visibility: Visibility):
    """What the layers look through: a mask for each window, or segments, where a backend wants
    these."""
    q_len, kv_len = (segments.shape[1] for segments in visibility[:2])
    if _backend(config, q_len, kv_len) in SEGMENTED:
        return visibility.query_segments
    return masks(config, visibility)


def masks(config, visibility: Visibility) -> tuple[jax.Array, ...]:
    """A mask for each window."""
    return tuple(visibility.mask(window) for window in windows(config))


def pick(masks, windowed):
    """A layer's mask among `masks`."""
    return masks[0] if len(masks) == 1 else jnp.where(windowed, masks[1], masks[0])


def attend_row(config, query, key, value, sight, windowed):
    """`attend` by the backend of choice, of queries to keys of the same positions.

    Args:
      config: of the decoder.
      query, key, value: as in `attend`.
      sight: of the function of that name.
      windowed: bool scalar, whether the layer has a window.
    """
    scale, softcap = config.attention_scale, config.attention_softcap
    backend = _backend(config, query.shape[1], key.shape[1])
    if backend not in SEGMENTED:
        return attend(
            query,
            key,
            value,
            mask=pick(sight, windowed),
            scale=scale,
            softcap=softcap,
            backend=backend,
        )
    inputs = (query, key, value, sight)
    kernels = [
        functools.partial(SEGMENTED[backend], window=window, scale=scale, softcap=softcap)
        for window in windows(config)
    ]
    if len(kernels) == 1:
        return kernels[0](*inputs)
    # A kernel is built for one window, so a layer branches between the two.
    return jax.lax.cond(windowed, kernels[1], kernels[0], *inputs)


def frequency_tables(config) -> tuple[np.ndarray, np.ndarray]:
    """Inverse rotary frequencies (Su et al., 2021), and which layer uses which.

    Llama 3.1's scaling leaves short wavelengths alone, divides long ones by a factor, and
    interpolates between. A layer without rotary positions has frequency zero.

    Returns:
      `(tables float32 [tables, head_dim/2], table of each layer int32 [layers])`.
    """
    steps = np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
    frequency = np.float32(config.rope_theta) ** -steps / config.rope_factor
    if config.rope_scaling is not None:
        factor, low, high, original_length = config.rope_scaling
        wavelength = 2 * math.pi / frequency
        smooth = np.clip((original_length / wavelength - low) / (high - low), 0.0, 1.0)
        frequency = (1 - smooth) * frequency / factor + smooth * frequency
    of_layer = np.tile(frequency.astype(np.float32), (config.num_layers, 1))
    if config.rope_local_theta is not None:
        of_layer[list(config.windowed_layers)] = np.float32(config.rope_local_theta) ** -steps
    of_layer[list(config.unrotated_layers)] = 0.0
    tables, index = np.unique(of_layer, axis=0, return_inverse=True)
    return tables, index.reshape(-1).astype(np.int32)


class Rotation(NamedTuple):
    """Sines and cosines of rotary positions, float32 `[tables, batch, seq, 1, head_dim/2]`."""

    sin: jax.Array
    cos: jax.Array

    def table(self, index) -> "Rotation":
        """The rotation of one table: no leading axis."""
        if self.sin.shape[0] == 1:
            index = 0
        return Rotation(self.sin[index], self.cos[index])


def rotation(config, positions: jax.Array) -> Rotation:
    """Rotations of positions int32 `[batch, seq]`, once for all layers."""
    tables, _ = frequency_tables(config)
    angle = positions[None, :, :, None, None].astype(jnp.float32) * tables[:, None, None, None]
    # The barrier keeps XLA from computing them anew in every layer's fusion.
    return Rotation(*jax.lax.optimization_barrier((jnp.sin(angle), jnp.cos(angle))))


def rotate(x: jax.Array, by: Rotation) -> jax.Array:
    """Applies rotary embeddings in the half-split layout that Hugging Face checkpoints use.

    Args:
      x: `[batch, seq, heads, head_dim]`.
      by: of one table.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate(
        [first * by.cos - second * by.sin, second * by.cos + first * by.sin], axis=-1
    )
    return rotated.astype(x.dtype)
