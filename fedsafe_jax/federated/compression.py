"""Compressed client updates, with error feedback."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

BLOCK = 256  # values that share an int8 scale
COMPRESSIONS = ("", "topk", "int8")


class Compression(NamedTuple):
    """A lossy code for flat updates.

    Attributes:
      roundtrip: `float32 [params] -> float32 [params]`, what the server decodes.
      num_bytes: `params -> bytes` of one update on the wire.
    """

    roundtrip: Callable
    num_bytes: Callable


def _topk(share: float) -> Compression:
    def count(params: int) -> int:
        return max(1, -(-int(params * share * 1e6) // 10**6))

    def roundtrip(update):
        _, places = jax.lax.top_k(jnp.abs(update), count(update.size))
        return jnp.zeros_like(update).at[places].set(update[places])

    return Compression(roundtrip, lambda params: 8 * count(params))  # float32 value, int32 place


def _int8() -> Compression:
    def roundtrip(update):
        blocks = jnp.pad(update, (0, -update.size % BLOCK)).reshape(-1, BLOCK)
        scale = jnp.max(jnp.abs(blocks), axis=1, keepdims=True) / 127
        codes = jnp.round(blocks / jnp.where(scale > 0, scale, 1.0))
        return (codes * scale).reshape(-1)[: update.size]

    return Compression(roundtrip, lambda params: params + 4 * -(-params // BLOCK))


def make(name: str, topk_share: float = 0.05) -> Compression | None:
    """`topk`: the largest values alone (Aji & Heafield, 2017); `int8`: 8-bit codes with a scale a
    block of 256; None for ""."""
    if not name:
        return None
    return _topk(topk_share) if name == "topk" else _int8()


def send(compression: Compression, update: jax.Array, residual: jax.Array):
    """Compresses an update and what earlier rounds left out (error feedback, Karimireddy et al.,
    2019, Algorithm 1).

    Args:
      compression: the code.
      update, residual: float32 `[params]`.

    Returns:
      `(what the server decodes, new residual)`.
    """
    whole = update + residual
    decoded = compression.roundtrip(whole)
    return decoded, whole - decoded
