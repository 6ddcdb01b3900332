"""FedSA-LoRA: clients train both factors, share `a`, and keep `b` for themselves.

"Selective Aggregation for Low-Rank Adaptation in Federated Learning" (Guo et al., 2025, arXiv
2410.01463). Client k's model is the global `a` with its own `b`; there is no global
model, and the server's `b` stays at LoRA's start, zero.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedsafe_jax.federated.algorithms.base import (
    Algorithm,
    ClientUpdate,
    FederatedAlgorithm,
    Hyperparameters,
    ServerState,
    count,
    counted_step,
)
from fedsafe_jax.federated.algorithms.halves import chosen
from fedsafe_jax.federated.client import LocalTraining, local_training

SHARED = {"a": True, "b": False}


def personal(factors: Any, own: Any) -> Any:
    """Returns a client's model.

    Args:
      factors: global LoRA factors.
      own: factors of which the client keeps `b`.
    """
    return chosen(factors, own, SHARED)


def make(
    training: LocalTraining, num_clients: int, hyperparameters: Hyperparameters
) -> FederatedAlgorithm:
    """Returns FedAvg of `a`, with `b` in the state of each client."""
    del num_clients
    rate = hyperparameters.server_learning_rate

    def init(factors):
        return ServerState(factors, (), jnp.zeros((), jnp.int32))

    def init_client(factors):
        # Both factors, so that the state has the structure of the factors; `a` stays zero.
        return jax.tree.map(jnp.zeros_like, factors)

    def client_update(server, client_state, start, base, batches, steps):
        del server
        mine = personal(start, client_state)
        result = local_training(training, mine, base, batches=batches, steps=steps)
        zero = jax.tree.map(jnp.zeros_like, start)
        delta = chosen(jax.tree.map(jnp.subtract, result.factors, start), zero, SHARED)
        return ClientUpdate(delta, ()), chosen(zero, result.factors, SHARED), result

    def server_update(server, delta, control):
        del control
        zero = jax.tree.map(jnp.zeros_like, delta)
        return counted_step(server, chosen(delta, zero, SHARED), rate)

    return FederatedAlgorithm(
        init,
        init_client,
        client_update,
        server_update=server_update,
        sent=lambda server: ("a",),
        received=lambda factors, clients: count(factors, ("a",)),
    )


FEDSA_LORA = Algorithm(make, sites=False, personal=personal)
