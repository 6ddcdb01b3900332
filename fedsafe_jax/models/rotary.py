"""Rotary positions (RoPE, arXiv 2104.09864) of every supported family."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from fedsafe_jax.models.decoder_config import DecoderConfig


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
