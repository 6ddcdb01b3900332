"""First and second moments of the server's mean delta, shared by the optimizers that keep them.

A variant `copy` or `m2` is what OpenFedLLM (Ye et al., 2024, arXiv 2402.06954) computes where the
papers say `zero` and `d2`. The formulas hold for the mean delta and for its negative alike.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class MomentState(NamedTuple):
    """State of a server optimizer."""

    count: jax.Array  # int32, rounds done
    first: Any  # m, shaped like the factors
    second: Any  # v, shaped like the factors; () without a second moment


def _from_zero(momentum: jax.Array, delta: jax.Array, beta: float, count: jax.Array) -> jax.Array:
    del count
    return beta * momentum + (1 - beta) * delta


def _from_first(momentum: jax.Array, delta: jax.Array, beta: float, count: jax.Array) -> jax.Array:
    return jnp.where(count == 0, delta, beta * momentum + (1 - beta) * delta)


# `(m, delta, beta, rounds done) -> m`: a momentum that starts at zero, or as the first mean delta.
FIRST_MOMENTS: dict[str, Callable] = {"zero": _from_zero, "copy": _from_first}

# `(delta, m) -> what is squared`: the mean delta, or the momentum.
SECOND_MOMENTS: dict[str, Callable] = {
    "d2": lambda delta, momentum: delta,
    "m2": lambda delta, momentum: momentum,
}


def next_momentum(state: MomentState, delta: Any, beta: float, first_moment: str) -> Any:
    """Returns the momentum after a round, shaped like the factors.

    Args:
      state: moments before the round.
      delta: mean delta of the round, or its negative.
      beta: weight of the old momentum.
      first_moment: a name in `FIRST_MOMENTS`.
    """
    update = FIRST_MOMENTS[first_moment]
    return jax.tree.map(lambda m, d: update(m, d, beta, state.count), state.first, delta)
