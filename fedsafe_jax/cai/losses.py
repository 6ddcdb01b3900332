"""Preference losses on log-likelihood ratios; pure functions of arrays.

A log-ratio is the summed log-likelihood of an answer under the adapter in training, less that under
the reference; float32 `[pairs]`.
"""

import jax
import jax.numpy as jnp

PREFERENCES = ("dpo", "ipo", "kto")


def dpo(chosen: jax.Array, rejected: jax.Array, beta: float) -> jax.Array:
    """Direct preference optimisation (Rafailov et al., 2023, equation 7).

    Args:
      chosen, rejected: log-ratios of the better and the worse answer.
      beta: strength of the tie to the reference.

    Returns:
      A loss a pair.
    """
    return -jax.nn.log_sigmoid(beta * (chosen - rejected))


def ipo(chosen: jax.Array, rejected: jax.Array, beta: float) -> jax.Array:
    """Identity preference optimisation (Azar et al., 2023, equation 17, tau = beta).

    The margin is drawn to `1 / (2 beta)` instead of growing without end. Arguments as for `dpo`.
    """
    return jnp.square(chosen - rejected - 1 / (2 * beta))


def kto(chosen, rejected, mismatched_chosen, mismatched_rejected, on, beta: float) -> jax.Array:
    """Kahneman-Tversky optimisation (Ethayarajh et al., 2024, equations 6 to 8), equal weights.

    The point that gains and losses are counted from is the mean log-ratio of answers to other
    prompts, an estimate of the divergence from the reference; no gradient flows through it.

    Args:
      chosen, rejected: log-ratios of the better and the worse answer.
      mismatched_chosen, mismatched_rejected: log-ratios of the next pair's answers to each prompt.
      on: float32 `[pairs]`, 0 for pairs that fill the batch.
      beta: strength of the tie to the reference.

    Returns:
      A loss a pair: the mean of its desirable and its undesirable example's.
    """
    other = (mismatched_chosen + mismatched_rejected) * on
    point = jnp.maximum(jnp.sum(other) / jnp.maximum(2 * jnp.sum(on), 1), 0)
    point = jax.lax.stop_gradient(point)
    desirable = 1 - jax.nn.sigmoid(beta * (chosen - point))
    undesirable = 1 - jax.nn.sigmoid(beta * (point - rejected))
    return (desirable + undesirable) / 2
