"""Local training alone: every client keeps what it learns, and the server takes nothing.

It is the baseline of what a federation gains. Client k's model is the adapter that all began with
plus what client k has learned in the rounds it was drawn for, as often as in a federation.
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
)
from fedsafe_jax.federated.client import LocalTraining, local_training


def personal(factors: Any, own: Any) -> Any:
    """Returns a client's model: the factors that all began with, and what the client learned."""
    return jax.tree.map(jnp.add, factors, own)


def make(
    training: LocalTraining, num_clients: int, hyperparameters: Hyperparameters
) -> FederatedAlgorithm:
    """Returns training whose clients go on from their own factors; updates are zero."""
    del num_clients, hyperparameters

    def zeros(factors):
        return jax.tree.map(jnp.zeros_like, factors)

    def client_update(server, client_state, start, base, batches, steps):
        del server
        mine = personal(start, client_state)
        result = local_training(training, mine, base, batches=batches, steps=steps)
        learned = jax.tree.map(jnp.subtract, result.factors, start)
        return ClientUpdate(zeros(start), ()), learned, result

    return FederatedAlgorithm(
        lambda factors: ServerState(factors, (), ()),
        zeros,
        client_update,
        server_update=lambda server, delta, control: server,
        sent=lambda server: (),
        received=lambda factors, clients: 0,
    )


LOCAL = Algorithm(
    make,
    sites=False,
    personal=personal,
    refuses={
        "federated.noise_multiplier": "nothing is sent, so there is nothing to hide",
        "federated.compression": "nothing is sent",
    },
)
