"""Compressed client updates, with error feedback."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedsafe_jax.registry import look_up

BLOCK = 256  # values that share an int8 scale


class Compression(NamedTuple):
    """A lossy code for flat updates.

    Attributes:
      roundtrip: `float32 [params] -> float32 [params]`, what the server decodes.
      num_bytes: `params -> bytes` of one update on the wire.
    """

    roundtrip: Callable
    num_bytes: Callable


def topk(share: float) -> Compression:
    """Returns the code that sends the largest values alone (Aji & Heafield, 2017, arXiv
    1704.05021).

    Args:
      share: share of the values that are sent.
    """

    def count(params: int) -> int:
        # In whole millionths: in floats 100 * 0.55 is above 55, and would be rounded up to 56.
        return max(1, -(-int(params * share * 1e6) // 10**6))

    def roundtrip(update):
        _, places = jax.lax.top_k(jnp.abs(update), count(update.size))
        return jnp.zeros_like(update).at[places].set(update[places])

    return Compression(roundtrip, lambda params: 8 * count(params))  # float32 value, int32 place


def int8() -> Compression:
    """Returns the code that sends 8-bit integers, with a float32 scale a block of 256."""

    def roundtrip(update):
        blocks = jnp.pad(update, (0, -update.size % BLOCK)).reshape(-1, BLOCK)
        scale = jnp.max(jnp.abs(blocks), axis=1, keepdims=True) / 127
        codes = jnp.round(blocks / jnp.where(scale > 0, scale, 1.0))
        return (codes * scale).reshape(-1)[: update.size]

    return Compression(roundtrip, lambda params: params + 4 * -(-params // BLOCK))


# `topk_share -> Compression` by name; None where updates are sent as they are.
COMPRESSIONS: dict[str, Callable[[float], Compression | None]] = {
    "": lambda topk_share: None,
    "topk": topk,
    "int8": lambda topk_share: int8(),
}


def make(name: str, topk_share: float = 0.05) -> Compression | None:
    """Returns the code of a name in `COMPRESSIONS`.

    Args:
      name: a key of `COMPRESSIONS`; "" for none.
      topk_share: share of the values that `topk` sends.

    Raises:
      UnknownNameError: there is no such code.
    """
    return look_up(COMPRESSIONS, name, "compression")(topk_share)


def send(
    compression: Compression, update: jax.Array, residual: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Compresses an update together with what earlier rounds left out.

    This is error feedback (Karimireddy et al., 2019, arXiv 1901.09847, Algorithm 1).

    Args:
      compression: the code.
      update, residual: float32 `[params]`.

    Returns:
      `(what the server decodes, new residual)`, float32 `[params]` each.
    """
    whole = update + residual
    decoded = compression.roundtrip(whole)
    return decoded, whole - decoded
