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
    count,
    fedopt,
    server_step,
)
from fedsafe_jax.federated.algorithms.constrained_sft import CONSTRAINED_SFT
from fedsafe_jax.federated.algorithms.fedavg import FEDAVG
from fedsafe_jax.federated.algorithms.fedavgm import FEDAVGM
from fedsafe_jax.federated.algorithms.feddyn import FEDDYN
from fedsafe_jax.federated.algorithms.fedex_lora import FEDEX_LORA
from fedsafe_jax.federated.algorithms.fednova import FEDNOVA
from fedsafe_jax.federated.algorithms.fedprox import FEDPROX
from fedsafe_jax.federated.algorithms.fedrot_lora import FEDROT_LORA
from fedsafe_jax.federated.algorithms.fedsa_lora import FEDSA_LORA
from fedsafe_jax.federated.algorithms.fedsvd import FEDSVD
from fedsafe_jax.federated.algorithms.ffa_lora import FFA_LORA
from fedsafe_jax.federated.algorithms.flasc import FLASC
from fedsafe_jax.federated.algorithms.flora import FLORA
from fedsafe_jax.federated.algorithms.hetlora import HETLORA
from fedsafe_jax.federated.algorithms.kl_start import KL_START
from fedsafe_jax.federated.algorithms.local import LOCAL
from fedsafe_jax.federated.algorithms.rolora import ROLORA
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
    "fednova": FEDNOVA,
    "feddyn": FEDDYN,
    "ffa_lora": FFA_LORA,
    "rolora": ROLORA,
    "fedsa_lora": FEDSA_LORA,
    "fedex_lora": FEDEX_LORA,
    "flora": FLORA,
    "fedsvd": FEDSVD,
    "fedrot_lora": FEDROT_LORA,
    "hetlora": HETLORA,
    "flasc": FLASC,
    "constrained_sft": CONSTRAINED_SFT,
    "kl_start": KL_START,
    "local": LOCAL,
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
    "count",
    "fedopt",
    "make",
    "server_step",
]
