"""FedSVD: clients train `b`, and the server makes `a` the left singular vectors of the product.

"FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA" (Lee et al., 2025,
arXiv 2505.12805). With orthonormal `a` the gradient of `b` is no longer than that of the
product, so clipping and noise for differential privacy cost less. The first round has LoRA's start.
"""

from fedsafe_jax.federated import lora_average
from fedsafe_jax.federated.algorithms import halves
from fedsafe_jax.federated.algorithms.base import Algorithm, FederatedAlgorithm, Hyperparameters
from fedsafe_jax.federated.client import LocalTraining


def make(
    training: LocalTraining, num_clients: int, hyperparameters: Hyperparameters
) -> FederatedAlgorithm:
    """Returns FedAvg of `b`, followed by `a, b = U, S V^T` of `a b = U S V^T`.

    The product stays the same: its rank is that of the factors.
    """
    del num_clients
    return halves.make(
        training,
        hyperparameters.server_learning_rate,
        lambda done: {"a": False, "b": True},
        after=lora_average.orthonormal,
    )


FEDSVD = Algorithm(
    make,
    refuses={"federated.compression": "its error feedback lives in a basis that every round turns"},
)
