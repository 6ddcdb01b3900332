"""SCAFFOLD: control variates correct the drift of the clients' local steps.

"SCAFFOLD: Stochastic Controlled Averaging for Federated Learning" (Karimireddy et al., 2020, arXiv
1910.06378), Algorithm 1. Local steps are corrected by `c - c_i`, and in every round
`c += (1/N) sum_i (c_i_new - c_i)`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedsafe_jax.federated.algorithms.base import (
    Algorithm,
    ClientUpdate,
    FederatedAlgorithm,
    Hyperparameters,
    ServerState,
    server_step,
)
from fedsafe_jax.federated.client import LocalResult, LocalTraining, local_training


class Correction(NamedTuple):
    """How `c - c_i` enters the local steps, and the client's new control variate.

    Attributes:
      hooks: `correction -> keyword arguments of local_training`.
      new_control: `(result, delta, correction, rates) -> c_i_new`.
    """

    hooks: Callable
    new_control: Callable


def _adjust_gradients(correction) -> dict:
    return {"adjust": lambda gradient, local: jax.tree.map(jnp.add, gradient, correction)}


def _mean_gradient(result: LocalResult, delta, correction, rates: jax.Array):
    del delta, correction, rates
    return result.gradient


def _shift_parameters(correction) -> dict:
    return {"after": lambda y, rate: jax.tree.map(lambda p, c: p - rate * c, y, correction)}


def _option_two(result: LocalResult, delta, correction, rates: jax.Array):
    way = jnp.maximum(jnp.sum(rates * result.active), 1e-12)
    return jax.tree.map(lambda d, c: -d / way - c, delta, correction)


# `gradient` adds the correction to every gradient, and the new c_i is the mean raw gradient of the
# local steps. Under SGD that equals the paper's option II, `c_i - c + (x - y)/(K rate)`; unlike
# that formula it stays a gradient under Adam, whose steps are not proportional to gradients.
# `post_step` subtracts `rate * (c - c_i)` from the parameters after every optimizer step and keeps
# the formula, as OpenFedLLM (Ye et al., 2024, arXiv 2402.06954) does.
CORRECTIONS: dict[str, Correction] = {
    "gradient": Correction(_adjust_gradients, _mean_gradient),
    "post_step": Correction(_shift_parameters, _option_two),
}


def _zeros(factors: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, factors)


def make(
    training: LocalTraining, num_clients: int, hyperparameters: Hyperparameters
) -> FederatedAlgorithm:
    """Returns SCAFFOLD with the correction that `hyperparameters.scaffold` names.

    Args:
      training: loss and optimizer of the clients.
      num_clients: N, clients of the run, in the cohort or not.
      hyperparameters: `server_learning_rate` and `scaffold` are read.
    """
    optimizer = optax.sgd(hyperparameters.server_learning_rate)
    hooks, new_control = CORRECTIONS[hyperparameters.scaffold]

    def init(factors):
        return ServerState(factors, _zeros(factors), optimizer.init(factors))

    def client_update(server, client_state, start, base, batches, steps):
        correction = jax.tree.map(jnp.subtract, server.control, client_state)
        result = local_training(
            training, start, base, batches=batches, steps=steps, **hooks(correction)
        )
        delta = jax.tree.map(jnp.subtract, result.factors, start)
        control = new_control(result, delta, correction, steps.rates)
        change = jax.tree.map(jnp.subtract, control, client_state)
        return ClientUpdate(delta, change), control, result

    def server_update(server, delta, control):
        changed = jax.tree.map(lambda c, d: c + d / num_clients, server.control, control)
        return server_step(optimizer, server, delta)._replace(control=changed)

    return FederatedAlgorithm(init, _zeros, client_update, server_update=server_update)


SCAFFOLD = Algorithm(make, controls=True)
