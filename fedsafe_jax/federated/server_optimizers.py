"""Server optimizers: optax transformations of the negative mean delta, a pseudo-gradient.

Reddi et al. (2021), Algorithm 2. `second_moment="m2"` and `first="copy"` are what OpenFedLLM
computes instead: the square of the momentum, and a momentum that starts as the first mean.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class AdaptiveState(NamedTuple):
    """Of `adaptive` and `momentum`."""

    count: jax.Array  # int32, rounds done
    first: Any  # m
    second: Any  # v; () for `momentum`


def _momentum(state, gradient, beta1: float, first: str):
    start = state.count == 0 if first == "copy" else False

    def step(m, g):
        return jnp.where(start, g, beta1 * m + (1 - beta1) * g)

    return jax.tree.map(step, state.first, gradient)


def momentum(rate: float, beta: float, first: str = "zero") -> optax.GradientTransformation:
    """FedAvgM (Hsu et al., 2019): m = beta m + D, x += rate m. With `first="copy"` OpenFedLLM's:
    m = D at first, then beta m + (1 - beta) D."""
    if first == "zero":
        return optax.sgd(rate, momentum=beta)

    def init(params):
        zero = jax.tree.map(jnp.zeros_like, params)
        return AdaptiveState(jnp.zeros((), jnp.int32), zero, ())

    def update(gradient, state, params=None):
        del params
        m = _momentum(state, gradient, beta, first)
        state = AdaptiveState(state.count + 1, m, ())
        return jax.tree.map(lambda m: -rate * m, m), state

    return optax.GradientTransformation(init, update)


def adaptive(
    kind: str,
    rate: float,
    beta1: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-3,
    second_moment: str = "d2",
    first: str = "zero",
) -> optax.GradientTransformation:
    """FedAdagrad, FedYogi and FedAdam: x += rate m / (sqrt(v) + tau), v from tau^2, no bias
    correction.

    Args:
      kind: `adagrad` (m = D), `yogi` or `adam`.
      rate: eta.
      beta1, beta2, tau: of the paper.
      second_moment: `d2`: of the mean delta D, as in the paper; `m2`: of the momentum.
      first: `zero`: m starts at zero; `copy`: as the first D.
    """

    def init(params):
        zero = jax.tree.map(jnp.zeros_like, params)
        second = jax.tree.map(lambda z: z + tau**2, zero)
        return AdaptiveState(jnp.zeros((), jnp.int32), zero, second)

    def grow(v, square):
        if kind == "adagrad":
            return v + square
        if kind == "adam":
            return beta2 * v + (1 - beta2) * square
        return v - (1 - beta2) * square * jnp.sign(v - square)

    def update(gradient, state, params=None):
        del params
        m = gradient if kind == "adagrad" else _momentum(state, gradient, beta1, first)
        squared = gradient if kind == "adagrad" or second_moment == "d2" else m
        v = jax.tree.map(lambda v, x: grow(v, jnp.square(x)), state.second, squared)
        step = jax.tree.map(lambda m, v: -rate * m / (jnp.sqrt(v) + tau), m, v)
        return step, AdaptiveState(state.count + 1, m, v)

    return optax.GradientTransformation(init, update)
