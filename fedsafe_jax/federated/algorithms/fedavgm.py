"""FedAvgM: the server takes momentum steps.

"Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification" (Hsu
et al., 2019, arXiv 1909.06335).
"""

import jax
import jax.numpy as jnp
import optax

from fedsafe_jax.federated.algorithms.base import (
    Algorithm,
    FederatedAlgorithm,
    Hyperparameters,
    fedopt,
)
from fedsafe_jax.federated.algorithms.moments import MomentState, next_momentum
from fedsafe_jax.federated.client import LocalTraining


def momentum(
    learning_rate: float, beta: float, first_moment: str = "zero"
) -> optax.GradientTransformation:
    """Returns the server optimizer: m = beta m + D, x += rate m.

    Args:
      learning_rate: step size of the server.
      beta: weight of the old momentum.
      first_moment: `zero`: the formula above, the paper's. Another name in
        `moments.FIRST_MOMENTS`: that running mean, in which D weighs `1 - beta`.
    """
    if first_moment == "zero":
        return optax.sgd(learning_rate, momentum=beta)

    def init(factors):
        zero = jax.tree.map(jnp.zeros_like, factors)
        return MomentState(jnp.zeros((), jnp.int32), zero, ())

    def update(gradient, state, params=None):
        del params
        m = next_momentum(state, gradient, beta, first_moment)
        return jax.tree.map(lambda m: -learning_rate * m, m), MomentState(state.count + 1, m, ())

    return optax.GradientTransformation(init, update)


def make(
    training: LocalTraining, num_clients: int, hyperparameters: Hyperparameters
) -> FederatedAlgorithm:
    """Returns FedAvg with momentum `beta1` on the server."""
    del num_clients
    h = hyperparameters
    return fedopt(training, momentum(h.server_learning_rate, h.beta1, h.first_moment))


FEDAVGM = Algorithm(make)
