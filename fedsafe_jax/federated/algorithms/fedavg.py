"""FedAvg: the server takes the mean of what the clients have learned.

"Communication-Efficient Learning of Deep Networks from Decentralized Data" (McMahan et al., 2017,
arXiv 1602.05629), Algorithm 1.
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
    """Returns FedAvg: x += rate sum_k w_k (y_k - x)."""
    del num_clients
    return fedopt(training, optax.sgd(hyperparameters.server_learning_rate))


FEDAVG = Algorithm(make, keeps_mean=True)
