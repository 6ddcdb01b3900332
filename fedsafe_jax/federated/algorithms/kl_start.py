"""A divergence from the round's start: clients learn their answers, and are held to what they were.

Client k minimises `L_k(y) + lambda KL(pi_ref || pi_y)`, the divergence being the mean over the
places that predict its own targets. Jaques et al. (2017, arXiv 1611.02796) hold a language model
to what it was so; here the expectation is under the reference, as in distillation from it
("Learning without Forgetting", Li and Hoiem, 2016, arXiv 1606.09282), so that the
gradient is 0 at the reference and every answer that it finds likely is kept likely.
"""

import functools

import jax

from fedsafe_jax.federated.algorithms import referenced
from fedsafe_jax.federated.algorithms.base import Algorithm, FederatedAlgorithm, Hyperparameters
from fedsafe_jax.federated.client import LocalTraining
from fedsafe_jax.models.reference_loss import Tokens


def held(tokens: Tokens, weight: float) -> jax.Array:
    """Returns the negative log-likelihood, with the gradient of it and of the divergence.

    Args:
      tokens: what the loss reads.
      weight: weight of the divergence.

    Returns:
      float32 `[rows, seq]`, in nats.
    """
    apart = tokens.divergence()
    return tokens.nll + weight * (apart - jax.lax.stop_gradient(apart))


def make(
    training: LocalTraining, num_clients: int, hyperparameters: Hyperparameters
) -> FederatedAlgorithm:
    """Returns FedAvg whose clients minimise their loss plus `kl_weight` times the divergence.

    What a round reports as its loss is the plain negative log-likelihood, as with other algorithms.
    """
    del num_clients
    loss = functools.partial(held, weight=hyperparameters.kl_weight)
    return referenced.make(training, hyperparameters, loss)


KL_START = Algorithm(make, keeps_mean=True)
