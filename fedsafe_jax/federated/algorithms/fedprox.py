"""FedProx: a proximal term keeps the clients near the global factors.

"Federated Optimization in Heterogeneous Networks" (Li et al., 2020, arXiv 1812.06127), Equation 2.
"""

import optax

from fedsafe_jax.federated.algorithms.base import (
    Algorithm,
    FederatedAlgorithm,
    Hyperparameters,
    fedopt,
)
from fedsafe_jax.federated.client import LocalTraining


def make(
    training: LocalTraining, num_clients: int, hyperparameters: Hyperparameters
) -> FederatedAlgorithm:
    """Returns FedAvg whose clients minimise their loss plus `mu/2 |y - x|^2`."""
    del num_clients
    optimizer = optax.sgd(hyperparameters.server_learning_rate)
    return fedopt(training, optimizer, hyperparameters.prox_mu)


FEDPROX = Algorithm(make, keeps_mean=True)
