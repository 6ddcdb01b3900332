"""Dropout of an adapter's inputs (PEFT's `lora_dropout`), from 32 random bits of each token.

`x -> keep * x / (1 - rate)` before `@ a @ b`, in training alone. The bits travel with the tokens,
so a token drops the same numbers in whatever row, microbatch, chunk or device it is computed, and
again when a layer is recomputed in the backward pass.
"""

import jax
import jax.numpy as jnp
from flax import struct

# A number of its own for each projection, so that each drops its own inputs.
NUMBERS = {
    "q_proj": 0, "k_proj": 1, "v_proj": 2, "o_proj": 3, "gate_proj": 4, "up_proj": 5,
    "down_proj": 6,
}  # fmt: skip


@struct.dataclass
class Dropout:
    """Random bits of tokens, and how many numbers are dropped.

    Attributes:
      noise: uint32 `[batch, seq]`.
      layer: int, the layer that drops; None for all of them.
      rate: share of the numbers that is dropped.
    """

    noise: jax.Array
    layer: jax.Array | None = None
    rate: float = struct.field(pytree_node=False, default=0.0)

    def of_layer(self, layer: jax.Array) -> "Dropout":
        """Returns the dropout of one layer."""
        return self.replace(layer=layer)

    def at(self, slots: jax.Array) -> "Dropout":
        """Returns the dropout of the tokens at `slots`, int32 `[count]`, of every row."""
        return self.replace(noise=self.noise[:, slots])

    def apply(self, x: jax.Array, projection: str) -> jax.Array:
        """Drops numbers of a projection's input.

        Args:
          x: `[batch, seq, in]`.
          projection: its name, one of `NUMBERS`.
        """
        # Threefry on every platform: other generators draw another way under `vmap`.
        key = jax.random.key(NUMBERS[projection], impl="threefry2x32")
        key = jax.random.fold_in(key, self.layer)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, self.noise.reshape(-1))
        bits = jax.vmap(lambda key: jax.random.bits(key, x.shape[-1:], jnp.uint32))(keys)
        keep = bits >= jnp.uint32(round(self.rate * 2**32))
        return jnp.where(keep.reshape(x.shape), x / (1 - self.rate), 0).astype(x.dtype)


def of_noise(noise: jax.Array | None, rate: float) -> Dropout | None:
    """Returns the dropout of a batch; None without noise, or at rate 0."""
    return None if noise is None or not rate else Dropout(noise, rate=rate)
