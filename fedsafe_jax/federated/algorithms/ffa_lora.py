"""FFA-LoRA: `a` keeps its random start, clients train and send `b` alone.

"Improving LoRA in Privacy-preserving Federated Learning" (Sun et al., 2024, arXiv 2403.12313).
In the paper's notation A is frozen and B is trained.
"""

from fedsafe_jax.federated.algorithms import halves
from fedsafe_jax.federated.algorithms.base import Algorithm, FederatedAlgorithm, Hyperparameters
from fedsafe_jax.federated.client import LocalTraining


def make(
    training: LocalTraining, num_clients: int, hyperparameters: Hyperparameters
) -> FederatedAlgorithm:
    """Returns FedAvg of `b`: b += rate sum_k w_k (b_k - b)."""
    del num_clients
    rate = hyperparameters.server_learning_rate
    return halves.make(training, rate, lambda done: {"a": False, "b": True})


FFA_LORA = Algorithm(make)
"""The mean of products is the product with the mean `b`, so `product_gap` is 0."""
