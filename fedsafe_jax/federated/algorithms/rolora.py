"""RoLoRA: the rounds train and average `b` and `a` in turn, with the other one fixed.

"Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA" (Chen et al., 2025, arXiv
2502.01755). Rounds that are skipped do not count, so that no factor loses its turn.
"""

from fedsafe_jax.federated.algorithms import halves
from fedsafe_jax.federated.algorithms.base import Algorithm, FederatedAlgorithm, Hyperparameters
from fedsafe_jax.federated.client import LocalTraining


def make(
    training: LocalTraining, num_clients: int, hyperparameters: Hyperparameters
) -> FederatedAlgorithm:
    """Returns FedAvg of `b` in the first round and every second one, of `a` in the others."""
    del num_clients
    rate = hyperparameters.server_learning_rate
    return halves.make(training, rate, lambda done: {"a": done % 2 == 1, "b": done % 2 == 0})


# A site does not know how many of the rounds counted.
ROLORA = Algorithm(make, sites=False)
