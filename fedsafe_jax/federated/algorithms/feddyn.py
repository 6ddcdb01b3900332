"""FedDyn: a penalty that changes with every round makes the clients' optima those of all.

"Federated Learning Based on Dynamic Regularization" (Acar et al., 2021, arXiv 2111.04263),
Algorithm 1. Client k minimises `L_k(y) - <g_k, y> + alpha/2 |y - x|^2`, and then `g_k -= alpha (y -
x)`; the server keeps `h -= (alpha / N) sum_k (y_k - x)` over all N clients, and `x` becomes the
plain mean of the `y_k` minus `h / alpha`.
"""

import jax
import jax.numpy as jnp

from fedsafe_jax.federated.algorithms.base import (
    Algorithm,
    ClientUpdate,
    FederatedAlgorithm,
    Hyperparameters,
    ServerState,
)
from fedsafe_jax.federated.client import LocalTraining, local_training


def make(
    training: LocalTraining, num_clients: int, hyperparameters: Hyperparameters
) -> FederatedAlgorithm:
    """Returns FedDyn with `dyn_alpha`; a client's control is the number 1, so the server counts
    those that took part."""
    alpha = hyperparameters.dyn_alpha

    def zeros(factors):
        return jax.tree.map(jnp.zeros_like, factors)

    def init(factors):
        return ServerState(factors, jnp.zeros(()), zeros(factors))

    def client_update(server, client_state, start, base, batches, steps):
        del server

        def regularise(gradient, local):
            return jax.tree.map(
                lambda d, g, y, x: d - g + alpha * (y - x), gradient, client_state, local, start
            )

        result = local_training(
            training, start, base, batches=batches, steps=steps, adjust=regularise
        )
        delta = jax.tree.map(jnp.subtract, result.factors, start)
        state = jax.tree.map(lambda g, d: g - alpha * d, client_state, delta)
        return ClientUpdate(delta, jnp.ones(())), state, result

    def server_update(server, delta, control):
        h = jax.tree.map(
            lambda h, d: h - alpha * control / num_clients * d, server.optimizer, delta
        )
        factors = jax.tree.map(lambda x, d, h: x + d - h / alpha, server.factors, delta, h)
        return server._replace(factors=factors, optimizer=h)

    return FederatedAlgorithm(init, zeros, client_update, server_update=server_update)


FEDDYN = Algorithm(
    make,
    weighting="uniform",
    controls=True,
    sites=False,
    refuses={
        "federated.weighting": "all its clients count alike",
        "federated.stragglers": "updates that count per step are not those of its penalty",
    },
)
