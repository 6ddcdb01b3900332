"""Which tokens of packed rows see which."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


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

    @classmethod
    def in_rows(cls, segments: jax.Array) -> "Visibility":
        """Returns what tokens of a row see of it; `segments` is int32 `[batch, seq]`."""
        return cls(segments, segments, jnp.arange(segments.shape[1]))

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
