"""FedEx-LoRA: factors are averaged, and a residue makes up for what that does to their products.

"FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation Models"
(Singhal et al., 2025, arXiv 2410.09432): `W += s (sum_k w_k a_k b_k - a b)` with the
means a and b. The authors' code adds the transpose to layers of torch, right where they are square
alone; other code leaves out the scale s. Here both are in one place, `residue`.
"""

import functools

from fedsafe_jax.federated.algorithms import residue
from fedsafe_jax.federated.algorithms.base import (
    Algorithm,
    FederatedAlgorithm,
    Hyperparameters,
    count,
    counted_step,
)
from fedsafe_jax.federated.client import LocalTraining


def make(
    training: LocalTraining, num_clients: int, hyperparameters: Hyperparameters
) -> FederatedAlgorithm:
    """Returns FedAvg of factors, whose model is the mean of the clients' models."""
    del num_clients

    def combine(server, client_factors, weights, delta, key):
        del key
        stepped = counted_step(server, delta, 1.0)
        more = residue.absorb(server, client_factors, weights, stepped.factors)
        return stepped._replace(residue=more)

    return FederatedAlgorithm(
        lambda factors: residue.init(factors, hyperparameters.residue_rank),
        lambda factors: (),
        functools.partial(residue.client_update, training),
        server_update=lambda server, delta, control: counted_step(server, delta, 1.0),
        combine=combine,
        # The means, and the residue of the round.
        received=lambda factors, clients: (clients + 1) * count(factors),
        queued=False,  # the loss reads the residue too
    )


FEDEX_LORA = Algorithm(make, sites=False, refuses=residue.REFUSES)
