"""Token-wise constrained fine-tuning: the first tokens of an answer may hardly move.

"Safety Alignment Should Be Made More Than Just a Few Tokens Deep" (Qi et al., 2024, arXiv
2406.05946), Equation 3. With `d_t = log pi(y_t) - log pi_ref(y_t)`, the loss of an answer's token t
is `-(2 / beta_t) log sigmoid(beta_t d_t)`; its gradient is that of the negative log-likelihood
times `w_t = 2 sigmoid(-beta_t d_t)` (Appendix D.2). It is 1 where the model is its reference, and
for `beta_t = 0`, which is plain fine-tuning; it falls to 0 the likelier the token becomes, the
sooner the larger `beta_t`. As in the authors' code no weight is below 1e-3.

The paper has one answer a dialogue. Where a dialogue has several that are learned, each one's
tokens count from its own beginning: each may begin with a refusal.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fedsafe_jax.federated.algorithms import referenced
from fedsafe_jax.federated.algorithms.base import Algorithm, FederatedAlgorithm, Hyperparameters
from fedsafe_jax.federated.client import LocalTraining
from fedsafe_jax.models.reference_loss import Tokens

SMALLEST_WEIGHT = 1e-3


def places_in_answers(batch: Any) -> jax.Array:
    """Returns the place of each target in its answer, from 0, int32 `[rows, seq]`.

    An answer is a run of targets of one dialogue without a gap. Off target numbers mean nothing.

    Args:
      batch: `data.packing.Batch` with fields `[rows, seq]`.
    """
    is_target, segment = batch.mask != 0, batch.segment_ids
    before = jnp.pad(is_target[:, :-1] & (segment[:, 1:] == segment[:, :-1]), ((0, 0), (1, 0)))
    index = jnp.arange(is_target.shape[1], dtype=jnp.int32)
    begins = jnp.where(is_target & ~before, index, 0)
    return index - jax.lax.cummax(begins, axis=1)


def weights(gains: jax.Array, places: jax.Array, betas: Sequence[float]) -> jax.Array:
    """Returns `w_t` of each token, float32, from 1e-3 to 2.

    Args:
      gains: float32, any shape: `d_t`, the log-likelihood less that under the reference, in nats.
      places: int32 of that shape, place of each token in its answer, from 0.
      betas: beta of the answer's tokens in turn; the last one is that of all further ones too.
    """
    beta = jnp.asarray(betas, jnp.float32)[jnp.minimum(places, len(betas) - 1)]
    return jnp.maximum(2 * jax.nn.sigmoid(-beta * gains), SMALLEST_WEIGHT)


def constrained(tokens: Tokens, betas: Sequence[float]) -> jax.Array:
    """Returns the negative log-likelihood, with the gradient of the constrained loss.

    Args:
      tokens: what the loss reads.
      betas: as for `weights`.

    Returns:
      float32 `[rows, seq]`, in nats.
    """
    value = jax.lax.stop_gradient(tokens.nll)
    w = weights(tokens.reference_nll() - value, places_in_answers(tokens.batch), betas)
    return value + w * (tokens.nll - value)


def make(
    training: LocalTraining, num_clients: int, hyperparameters: Hyperparameters
) -> FederatedAlgorithm:
    """Returns FedAvg whose clients minimise the constrained loss.

    What a round reports as its loss is the plain negative log-likelihood, as with other algorithms.
    """
    del num_clients
    loss = functools.partial(constrained, betas=hyperparameters.constrained_betas)
    return referenced.make(training, hyperparameters, loss)


CONSTRAINED_SFT = Algorithm(make, keeps_mean=True)
