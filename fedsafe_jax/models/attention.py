"""Attention: which tokens see which, rotary positions, and the choice of backend."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from fedsafe_jax.models import block_attention
from fedsafe_jax.models.decoder_config import DecoderConfig

BACKENDS = ("auto", "xla", "cudnn", "splash", "blocks")
SPLASH_BLOCK = 128  # On TPU, sequence length and head size must be multiples of it.


class Visibility(NamedTuple):
    """Which keys a query may attend to: earlier ones (or itself) of its own segment.

    Padding is segment 0, and sees the padding before it, so that no softmax row is empty.

    Attributes:
      query_segments: int32 `[batch, q_len]`.
      key_segments: int32 `[batch, kv_len]`.
      slots: int32 `[q_len]`, index of each query among the keys.
    """

    query_segments: jax.Array
    key_segments: jax.Array
    slots: jax.Array

    def mask(self, window: int = 0) -> jax.Array:
        """Returns a mask, bool `[batch, 1, q_len, kv_len]`.

        Args:
          window: number of slots that a query sees, its own included; 0 for all before it.
        """
        queries, keys = self.slots[:, None], jnp.arange(self.key_segments.shape[1])[None, :]
        is_near = keys <= queries
        if window:
            is_near &= keys > queries - window
        is_same = self.query_segments[:, :, None] == self.key_segments[:, None, :]
        return (is_same & is_near)[:, None]


def choose_backend(
    wanted: str, q_len: int, kv_len: int, head_dim: int, dtype: DTypeLike, softcap: float | None
) -> str:
    """Returns `cudnn` (flash) on GPU, `splash` on TPU, `blocks` on CPU, `xla` where none applies.

    Args:
      wanted: one of `BACKENDS`; any but `auto` is returned as it is.
      q_len, kv_len: lengths of queries and keys; where they differ, in decoding, XLA is used.
      head_dim: size of a head.
      dtype: dtype of the query; cuDNN's flash attention has no float32.
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
    if platform == "cpu" and q_len >= block_attention.MIN_SEQ:
        return "blocks"
    return "xla"


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    scale: float,
    softcap: float | None = None,
    backend: str = "xla",
) -> jax.Array:
    """Computes grouped-query scaled dot-product attention under a mask, by XLA or cuDNN.

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
        # A bias instead of a mask, because cuDNN fails on a mask alone (jax#28974).
        return jax.nn.dot_product_attention(
            query, key, value, bias=_bias(mask, query), scale=scale, implementation="cudnn"
        )
    return attend_cache(
        query, key.swapaxes(1, 2), value.swapaxes(1, 2), mask=mask, scale=scale, softcap=softcap
    )


def attend_cache(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    scale: float,
    softcap: float | None = None,
) -> jax.Array:
    """Computes `attend` by XLA, with keys and values in the layout of the cache.

    Heads lie outside positions: then each head's product reads one block of memory, which on CPU
    is three times as fast as with heads inside.

    Args:
      query: `[batch, q_len, heads, head_dim]`.
      key, value: `[batch, kv_heads, kv_len, head_dim]`.
      mask, scale, softcap: as in `attend`.

    Returns:
      `[batch, q_len, heads, head_dim]` in the dtype of `value`.
    """
    batch, q_len, heads, head_dim = query.shape
    kv_heads, kv_len = key.shape[1], key.shape[2]
    # The query heads that share a key head are flattened with their positions into one axis, so
    # that the product is a plain batched matmul.
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


def splash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array,
    window: int,
    scale: float,
    softcap: float | None,
) -> jax.Array:
    """Computes TPU splash attention, which skips blocks that the causal or window mask hides.

    Args:
      query, key, value: as in `attend`, with `q_len == kv_len`.
      segments: int32 `[batch, seq]`.
      window: as in `Visibility.mask`; static.
      scale: factor of the query-key products.
      softcap: cap of attention logits, or None.

    Returns:
      `[batch, seq, heads, head_dim]` in the dtype of `query`.
    """
    # Pallas for TPU is imported only where it is used.
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    seq, heads = query.shape[1], query.shape[2]
    if window:
        mask = kernels.LocalMask((seq, seq), window_size=(window - 1, 0), offset=0)
    else:
        mask = kernels.CausalMask((seq, seq))
    kernel = kernels.make_splash_mha_single_device(
        kernels.MultiHeadMask([mask] * heads),
        attn_logits_soft_cap=softcap,
        interpret=jax.default_backend() != "tpu",
    )
    by_head = [x.swapaxes(1, 2) for x in (query * scale, key, value)]
    out = jax.vmap(kernel)(*by_head, kernels.SegmentIds(segments, segments))
    return out.swapaxes(1, 2).astype(query.dtype)


# Backends that read segment ids instead of a mask.
SEGMENTED = {"splash": splash, "blocks": block_attention.attend}


def windows(config: DecoderConfig) -> tuple[int, ...]:
    """Returns the window sizes that layers have, 0 (no window) first."""
    count = len(config.windowed_layers)
    if count in (0, config.num_layers):
        return (config.window if count else 0,)
    return (0, config.window)


def _backend(config: DecoderConfig, q_len: int, kv_len: int) -> str:
    return choose_backend(
        config.attention,
        q_len,
        kv_len,
        head_dim=config.head_dim,
        dtype=config.dtype,
        softcap=config.attention_softcap,
    )


def attention_inputs(
    config: DecoderConfig, visibility: Visibility
) -> jax.Array | tuple[jax.Array, ...]:
    """Returns the input of the chosen backend: masks (`masks`) or segment ids `[batch, seq]`."""
    q_len, kv_len = (segments.shape[1] for segments in visibility[:2])
    if _backend(config, q_len, kv_len) in SEGMENTED:
        return visibility.query_segments
    return masks(config, visibility)


def masks(config: DecoderConfig, visibility: Visibility) -> tuple[jax.Array, ...]:
    """Returns a mask, bool `[batch, 1, q_len, kv_len]`, for each of `windows`."""
    return tuple(visibility.mask(window) for window in windows(config))


def select_mask(masks: tuple[jax.Array, ...], windowed: ArrayLike) -> jax.Array:
    """Returns a layer's mask among `masks`; `windowed` is a bool scalar, which may be traced."""
    return masks[0] if len(masks) == 1 else jnp.where(windowed, masks[1], masks[0])


def attend_row(
    config: DecoderConfig,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    masks_or_segments: jax.Array | tuple[jax.Array, ...],
    windowed: ArrayLike,
) -> jax.Array:
    """Computes `attend` by the chosen backend, for queries and keys at the same positions.

    Args:
      config: the decoder's config.
      query, key, value: as in `attend`.
      masks_or_segments: what `attention_inputs` returns.
      windowed: bool scalar, whether the layer has a window.

    Returns:
      `[batch, seq, heads, head_dim]` in the dtype of `query`.
    """
    scale, softcap = config.attention_scale, config.attention_softcap
    backend = _backend(config, query.shape[1], key.shape[1])
    if backend not in SEGMENTED:
        return attend(
            query,
            key,
            value,
            mask=select_mask(masks_or_segments, windowed),
            scale=scale,
            softcap=softcap,
            backend=backend,
        )
    inputs = (query, key, value, masks_or_segments)
    kernels = [
        functools.partial(SEGMENTED[backend], window=window, scale=scale, softcap=softcap)
        for window in windows(config)
    ]
    if len(kernels) == 1:
        return kernels[0](*inputs)
    # A kernel is built for one window, so a layer branches between the two.
    return jax.lax.cond(windowed, kernels[1], kernels[0], *inputs)


def inverse_frequencies(theta: float, head_dim: int) -> np.ndarray:
    """Returns `theta ** (-2 i / head_dim)`, float32 `[head_dim/2]` (RoPE, arXiv 2104.09864)."""
    steps = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
    return np.float32(theta) ** -steps


def frequency_tables(config: DecoderConfig) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tables of inverse rotary frequencies, and the index of each layer's table.

    Llama 3.1's scaling (arXiv 2407.21783) leaves short wavelengths alone, divides the frequency of
    long ones by a factor, and interpolates between. A layer without rotary positions has frequency
    zero.

    Returns:
      `(tables float32 [tables, head_dim/2], index int32 [layers])`.
    """
    frequency = inverse_frequencies(config.rope_theta, config.head_dim) / config.rope_factor
    if config.rope_scaling is not None:
        factor, low, high, original_length = config.rope_scaling
        wavelength = 2 * math.pi / frequency
        smooth = np.clip((original_length / wavelength - low) / (high - low), 0.0, 1.0)
        frequency = (1 - smooth) * frequency / factor + smooth * frequency
    by_layer = np.tile(frequency.astype(np.float32), (config.num_layers, 1))
    if config.rope_local_theta is not None:
        local = inverse_frequencies(config.rope_local_theta, config.head_dim)
        by_layer[list(config.windowed_layers)] = local
    by_layer[list(config.unrotated_layers)] = 0.0
    tables, index = np.unique(by_layer, axis=0, return_inverse=True)
    return tables, index.reshape(-1).astype(np.int32)


class Rotation(NamedTuple):
    """Sines and cosines of rotary positions, float32 `[tables, batch, seq, 1, head_dim/2]`."""

    sin: jax.Array
    cos: jax.Array

    def table(self, index: ArrayLike) -> "Rotation":
        """Returns the rotation of one table, without the leading axis."""
        if self.sin.shape[0] == 1:
            index = 0
        return Rotation(self.sin[index], self.cos[index])


def rotation(config: DecoderConfig, positions: jax.Array) -> Rotation:
    """Returns the rotations of positions int32 `[batch, seq]`, computed once for all layers."""
    tables, _ = frequency_tables(config)
    angle = positions[None, :, :, None, None].astype(jnp.float32) * tables[:, None, None, None]
    # The barrier keeps XLA from computing them again in every layer's fusion.
    return Rotation(*jax.lax.optimization_barrier((jnp.sin(angle), jnp.cos(angle))))


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Applies rotary embeddings in the half-split layout that Hugging Face checkpoints use.

    Args:
      x: `[batch, seq, heads, head_dim]`.
      rotation: rotation of one table, `[batch, seq, 1, head_dim/2]`.

    Returns:
      `[batch, seq, heads, head_dim]` in the dtype of `x`; the rotation itself is float32.
    """
    sin, cos = rotation
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
