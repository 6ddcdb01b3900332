"""Attention masks, rotary positions and the choice of attention backend."""

import math

import jax
import jax.numpy as jnp


def packed_causal_mask(segment_ids: jax.Array) -> jax.Array:
    """Mask of packed rows: a token sees earlier tokens of its own segment only.

    Args:
      segment_ids: int32 `[batch, seq]`; 0 marks padding, examples count from 1.

    Returns:
      bool `[batch, 1, seq, seq]`, True where query (axis 2) may attend to key (axis 3). A padding
      query sees the padding before it, so that no softmax row is empty.
    """
    seq = segment_ids.shape[-1]
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    causal = jnp.tril(jnp.ones((seq, seq), bool))
    return (same & causal)[:, None]


def attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """Grouped-query scaled dot-product attention.

    Args:
      query: `[batch, q_len, heads, head_dim]`.
      key, value: `[batch, kv_len, kv_heads, head_dim]`, `heads % kv_heads == 0`.
      mask: bool, broadcastable to `[batch, heads, q_len, kv_len]`.

    Returns:
      `[batch, q_len, heads, head_dim]` in the dtype of `query`.
    """
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="xla")


def rotary_frequencies(head_dim: int, theta: float, scaling: tuple | None) -> jax.Array:
    """Inverse frequencies of rotary position embeddings (Su et al., 2021), float32 `[head_dim/2]`.

    Args:
      head_dim: size of one attention head.
      theta: base of the geometric progression.
      scaling: None, or Llama 3.1's `(factor, low_freq_factor, high_freq_factor, original_length)`,
        which leaves short wavelengths alone, divides long ones by `factor` and interpolates
        between.
    """
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is None:
        return frequency
    factor, low, high, original_length = scaling
    wavelength = 2 * math.pi / frequency
    smooth = jnp.clip((original_length / wavelength - low) / (high - low), 0.0, 1.0)
    return (1 - smooth) * frequency / factor + smooth * frequency


def rotate(x: jax.Array, positions: jax.Array, frequency: jax.Array) -> jax.Array:
    """Applies rotary embeddings in the half-split layout that Hugging Face checkpoints use.

    Args:
      x: `[batch, seq, heads, head_dim]`.
      positions: int32 `[batch, seq]`.
      frequency: float32 `[head_dim/2]`.
    """
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
