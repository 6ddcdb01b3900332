"""What FedEx-LoRA and FLoRA share: a residue of the clients' products, beside the trained factors.

Both papers add it to the frozen base. Here it is a second pair of LoRA factors with the scale of
the first, `alpha / lora_rank`, so the base stays what it was for all arms, nothing of its size is
made, and the whole is one adapter of the summed rank. Factors of clients with smaller ranks are
filled up with zeros and have that scale too: their products count in the same unit.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedsafe_jax.federated import lora_average
from fedsafe_jax.federated.algorithms.base import ClientUpdate, ServerState
from fedsafe_jax.federated.client import LocalSteps, LocalTraining, local_training

REFUSES = {
    "federated.aggregator": "what it sums are the clients' products, not their updates",
    "federated.noise_multiplier": "the sum of the clients' products has no noise",
    "federated.stragglers": "updates that count per step are not what the clients have",
    "lora_dropout": "the residue is part of the base, whose inputs are not dropped",
}


def init(factors: Any, residue_rank: int) -> ServerState:
    """Returns the server's state with an empty residue.

    Args:
      factors: LoRA factors to begin with.
      residue_rank: largest rank of the residue; 0 for the largest that any product has.
    """
    pairs = jax.tree.leaves(factors, is_leaf=lambda node: "a" in node)
    most = max(min(pair["a"].shape[-2], pair["b"].shape[-1]) for pair in pairs)
    rank = min(residue_rank or most, most)

    def empty(pair):
        a, b = pair["a"], pair["b"]
        return {
            "a": jnp.zeros((*a.shape[:-1], rank), a.dtype),
            "b": jnp.zeros((*b.shape[:-2], rank, b.shape[-1]), b.dtype),
        }

    residue = lora_average.each_pair(empty, factors)
    return ServerState(factors, (), jnp.zeros((), jnp.int32), residue)


def client_update(
    training: LocalTraining, server: ServerState, client_state: Any, start: Any, base: Any,
    batches: Any, steps: LocalSteps,
) -> tuple:  # fmt: skip
    """Trains a client's factors on the base with the residue; see `FederatedAlgorithm`."""

    def loss_fn(factors, frozen, batch):
        base, residue = frozen
        return training.loss_fn(lora_average.join(factors, residue), base, batch)

    result = local_training(
        training._replace(loss_fn=loss_fn),
        start,
        (base, server.residue),
        batches=batches,
        steps=steps,
    )
    delta = jax.tree.map(jnp.subtract, result.factors, start)
    return ClientUpdate(delta, ()), client_state, result


def absorb(server: ServerState, client_factors: Any, weights: jax.Array, factors: Any) -> Any:
    """Returns the residue with which new factors are the mean of the clients' models.

    It is the sum `residue + sum_k w_k a_k b_k - a b`, decomposed to the rank of the residue.

    Args:
      server: state before the step.
      client_factors, weights: see `lora_average.product_mean`.
      factors: the server's new factors, a and b; () for none.
    """
    total = lora_average.join(server.residue, lora_average.stacked(client_factors, weights))
    if factors:
        total = lora_average.join(total, lora_average.negative(factors))
    rank = jax.tree.leaves(server.residue)[0].shape[-1]
    return lora_average.orthonormal(total, rank)
