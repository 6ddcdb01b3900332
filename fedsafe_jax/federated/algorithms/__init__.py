"""Federated algorithms: a file each, and the registry `ALGORITHMS` by which a config names them.

An algorithm from elsewhere is one more entry: `ALGORITHMS["mine"] = Algorithm(make)`.
"""

from fedsafe_jax.federated.algorithms.adaptive import FEDADAGRAD, FEDADAM, FEDYOGI
from fedsafe_jax.federated.algorithms.base import (
    Algorithm,
    ClientUpdate,
    FederatedAlgorithm,
    Hyperparameters,
    ServerState,
    fedopt,
    server_step,
)
from fedsafe_jax.federated.algorithms.fedavg import FEDAVG
from fedsafe_jax.federated.algorithms.fedavgm import FEDAVGM
from fedsafe_jax.federated.algorithms.fedprox import FEDPROX
from fedsafe_jax.federated.algorithms.scaffold import SCAFFOLD
from fedsafe_jax.federated.client import LocalTraining
from fedsafe_jax.registry import look_up

ALGORITHMS: dict[str, Algorithm] = {
    "fedavg": FEDAVG,
    "fedprox": FEDPROX,
    "scaffold": SCAFFOLD,
    "fedavgm": FEDAVGM,
    "fedadagrad": FEDADAGRAD,
    "fedyogi": FEDYOGI,
    "fedadam": FEDADAM,
}


def make(
    name: str,
    training: LocalTraining,
    num_clients: int,
    hyperparameters: Hyperparameters | None = None,
) -> FederatedAlgorithm:
    """Returns the algorithm of a name in `ALGORITHMS`.

    Args:
      name: a key of `ALGORITHMS`.
      training: loss and optimizer of the clients.
      num_clients: clients of the run, in the cohort or not.
      hyperparameters: hyperparameters of all algorithms; None for the defaults.

    Raises:
      UnknownNameError: there is no such algorithm.
    """
    entry = look_up(ALGORITHMS, name, "algorithm")
    return entry.make(training, num_clients, hyperparameters or Hyperparameters())


__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "ClientUpdate",
    "FederatedAlgorithm",
    "Hyperparameters",
    "ServerState",
    "fedopt",
    "make",
    "server_step",
]
