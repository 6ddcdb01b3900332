"""Losses of Constitutional AI: the registry, and the preference losses on log-likelihood ratios.

A log-ratio is the summed log-likelihood of an answer under the adapter in training, less that under
the reference.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedsafe_jax.cai import derta


class Ratios(NamedTuple):
    """Log-ratios of a batch of preference pairs, each float32 `[pairs]`.

    Attributes:
      chosen, rejected: log-ratios of the better and the worse answer.
      mismatched_chosen, mismatched_rejected: log-ratios of the next pair's answers to each prompt;
        None where no loss needs them.
      on: 0 for pairs that fill the batch, else 1.
    """

    chosen: jax.Array
    rejected: jax.Array
    mismatched_chosen: jax.Array | None = None
    mismatched_rejected: jax.Array | None = None
    on: jax.Array | None = None


def dpo(ratios: Ratios, beta: float) -> jax.Array:
    """Direct preference optimisation (Rafailov et al., 2023, arXiv 2305.18290, equation 7).

    Args:
      ratios: log-ratios of the pairs.
      beta: strength of the tie to the reference.

    Returns:
      The loss of each pair, float32 `[pairs]`.
    """
    return -jax.nn.log_sigmoid(beta * (ratios.chosen - ratios.rejected))


def ipo(ratios: Ratios, beta: float) -> jax.Array:
    """Identity preference optimisation (Azar et al., 2023, arXiv 2310.12036, equation 17).

    With tau = beta. The margin is drawn to `1 / (2 beta)` instead of growing without end. Arguments
    as for `dpo`.
    """
    return jnp.square(ratios.chosen - ratios.rejected - 1 / (2 * beta))


def kto(ratios: Ratios, beta: float) -> jax.Array:
    """Kahneman-Tversky optimisation (Ethayarajh et al., 2024, arXiv 2402.01306, equations 6 to 8).

    Desirable and undesirable answers weigh the same. The point that gains and losses are counted
    from is the mean log-ratio of answers to other prompts, an estimate of the divergence from the
    reference; no gradient flows through it. Arguments as for `dpo`.

    Returns:
      The mean loss of each pair's desirable and undesirable answer, float32 `[pairs]`.
    """
    other = (ratios.mismatched_chosen + ratios.mismatched_rejected) * ratios.on
    point = jnp.maximum(jnp.sum(other) / jnp.maximum(2 * jnp.sum(ratios.on), 1), 0)
    point = jax.lax.stop_gradient(point)
    desirable = 1 - jax.nn.sigmoid(beta * (ratios.chosen - point))
    undesirable = 1 - jax.nn.sigmoid(beta * (point - ratios.rejected))
    return (desirable + undesirable) / 2


class Loss(NamedTuple):
    """What one loss needs besides the dialogues that are imitated.

    Attributes:
      preference: `(Ratios, beta) -> float32 [pairs]`, for a loss on preference pairs.
      mismatched: whether it also needs the next pair's answers to each prompt.
      make_rows: packs rows of its own out of a step's triples, which are then imitated; arguments
        as for `derta.batch`.

    The two that need nothing of this are about dialogues: `SFT` and `KL`.
    """

    preference: Callable[[Ratios, float], jax.Array] | None = None
    mismatched: bool = False
    make_rows: Callable | None = None


SFT = "sft"  # imitates the revisions themselves; replay is imitated with or without it
# Holds the model to its reference on the replay, which is then not imitated. Imitated, the greedy
# answers of the base make its distribution narrower, and what it says of other texts less likely.
KL = "kl"
LOSSES = {
    SFT: Loss(),
    "dpo": Loss(dpo),
    "ipo": Loss(ipo),
    "kto": Loss(kto, mismatched=True),
    "derta": Loss(make_rows=derta.batch),
    KL: Loss(),
}
