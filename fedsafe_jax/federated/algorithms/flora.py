"""FLoRA: the clients' factors are stacked into the model, and every round begins with new ones.

"FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations" (Wang
et al., 2024, arXiv 2409.05976): the model gains `sum_k w_k a_k b_k`, whatever the
clients' ranks. Some code mixes `alpha / r_k` on clients with `alpha / max r` on the server, or
leaves out the scale; here all products have that of `lora_rank`.
"""

import functools

from fedsafe_jax.federated import lora_average
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
    """Returns the algorithm; the first factors are those it is given, later ones are drawn."""
    del num_clients

    def combine(server, client_factors, weights, delta, key):
        del delta
        more = residue.absorb(server, client_factors, weights, ())
        return server._replace(
            factors=lora_average.fresh(server.factors, key),
            optimizer=server.optimizer + 1,
            residue=more,
        )

    return FederatedAlgorithm(
        lambda factors: residue.init(factors, hyperparameters.residue_rank),
        lambda factors: (),
        functools.partial(residue.client_update, training),
        server_update=lambda server, delta, control: counted_step(server, delta, 1.0),
        combine=combine,
        # What the round adds; the new factors are drawn from a seed.
        received=lambda factors, clients: clients * count(factors),
        queued=False,  # the loss reads the residue too
    )


FLORA = Algorithm(
    make,
    sites=False,
    refuses={
        **residue.REFUSES,
        "federated.compression": "its error feedback lives in factors that every round draws anew",
    },
)
