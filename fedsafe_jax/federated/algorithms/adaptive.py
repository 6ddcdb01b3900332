"""FedAdagrad, FedYogi and FedAdam: the server takes adaptive steps.

"Adaptive Federated Optimization" (Reddi et al., 2021, arXiv 2003.00295), Algorithm 2. The paper's
server sees the plain mean of the clients' deltas, without weights.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedsafe_jax.federated.algorithms.base import (
    Algorithm,
    FederatedAlgorithm,
    Hyperparameters,
    fedopt,
)
from fedsafe_jax.federated.algorithms.moments import SECOND_MOMENTS, MomentState, next_momentum
from fedsafe_jax.federated.client import LocalTraining


class Rule(NamedTuple):
    """What sets one adaptive method apart.

    Attributes:
      accumulate: `(v, square, beta2) -> v`, the second moment after a round.
      momentum: whether there is one; without, m and what is squared are the mean delta itself.
    """

    accumulate: Callable
    momentum: bool = True


ADAGRAD = Rule(lambda v, square, beta2: v + square, momentum=False)
YOGI = Rule(lambda v, square, beta2: v - (1 - beta2) * square * jnp.sign(v - square))
ADAM = Rule(lambda v, square, beta2: beta2 * v + (1 - beta2) * square)


def adaptive(rule: Rule, hyperparameters: Hyperparameters) -> optax.GradientTransformation:
    """Returns the server optimizer: x += eta m / (sqrt(v) + tau), v from tau^2.

    No bias is corrected, unlike in `optax.adam`: the paper has none.

    Args:
      rule: `ADAGRAD`, `YOGI` or `ADAM`.
      hyperparameters: `adaptive_learning_rate` (eta), `beta1`, `beta2`, `tau`, `second_moment` and
        `first_moment` are read.
    """
    h = hyperparameters

    def init(factors):
        zero = jax.tree.map(jnp.zeros_like, factors)
        second = jax.tree.map(lambda z: z + h.tau**2, zero)
        return MomentState(jnp.zeros((), jnp.int32), zero, second)

    def update(gradient, state, params=None):
        del params
        m = squared = gradient
        if rule.momentum:
            m = next_momentum(state, gradient, h.beta1, h.first_moment)
            squared = SECOND_MOMENTS[h.second_moment](gradient, m)
        v = jax.tree.map(
            lambda v, x: rule.accumulate(v, jnp.square(x), h.beta2), state.second, squared
        )
        step = jax.tree.map(
            lambda m, v: -h.adaptive_learning_rate * m / (jnp.sqrt(v) + h.tau), m, v
        )
        return step, MomentState(state.count + 1, m, v)

    return optax.GradientTransformation(init, update)


def make(
    training: LocalTraining, num_clients: int, hyperparameters: Hyperparameters, rule: Rule
) -> FederatedAlgorithm:
    """Returns FedAvg with the adaptive server optimizer of a rule."""
    del num_clients
    return fedopt(training, adaptive(rule, hyperparameters))


FEDADAGRAD, FEDYOGI, FEDADAM = (
    Algorithm(functools.partial(make, rule=rule), weighting="uniform")
    for rule in (ADAGRAD, YOGI, ADAM)
)
