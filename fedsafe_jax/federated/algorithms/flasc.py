"""FLASC's download mask: clients begin with the largest numbers of the adapter, and train all.

"Federated LoRA with Sparse Communication" (Kuo et al., 2024, arXiv 2406.05233). The
server sends the `download_share` largest numbers by magnitude, the others are zero; local training
is dense, and what a client learned from there is added to the whole adapter. The upload mask is
`compression="topk"`, here with error feedback, which the paper does not have.
"""

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from fedsafe_jax.federated.algorithms.base import (
    Algorithm,
    FederatedAlgorithm,
    Hyperparameters,
    count,
    fedopt,
)
from fedsafe_jax.federated.client import LocalTraining
from fedsafe_jax.federated.compression import topk


def make(
    training: LocalTraining, num_clients: int, hyperparameters: Hyperparameters
) -> FederatedAlgorithm:
    """Returns FedAvg whose clients begin with a part of the adapter."""
    del num_clients
    code = topk(hyperparameters.download_share)
    plain = fedopt(training, optax.sgd(hyperparameters.server_learning_rate))

    def client_update(server, client_state, start, base, batches, steps):
        _, unravel = ravel_pytree(server.factors)
        largest = unravel(code.roundtrip(ravel_pytree(server.factors)[0]))
        # Of a smaller rank a client has a prefix, of which `start` is zero elsewhere.
        received = jax.tree.map(lambda x, s: jnp.where(x != 0, s, 0.0), largest, start)
        return plain.client_update(server, client_state, received, base, batches, steps)

    return plain._replace(
        client_update=client_update,
        # A place and a value of each number, both of 4 bytes.
        received=lambda factors, clients: code.num_bytes(count(factors)) // 4,
    )


FLASC = Algorithm(make)
