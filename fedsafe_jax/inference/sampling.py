"""Draws the next token from logits: temperature, top-k, top-p and min-p."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sampling(NamedTuple):
    """Settings of how the next token is drawn; static, so that each setting is compiled once.

    Attributes:
      temperature: divisor of the logits; 0 takes the likeliest token and ignores the rest.
      top_k: number of likeliest tokens to draw among; 0 for all tokens.
      top_p: probability of the smallest set of likeliest tokens to draw among (Holtzman et al.,
        2020, arXiv 1904.09751); 1 for all tokens.
      min_p: least probability of a token to draw, as a fraction of the likeliest token's (Nguyen et
        al., 2024, arXiv 2407.01082); 0 for all tokens.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


GREEDY = Sampling()


def restrict(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Divides logits `[..., vocab]` by the temperature and sets excluded tokens to -inf.

    The filters apply in the order of transformers: temperature, top-k, top-p, min-p.

    Args:
      logits: `[..., vocab]`.
      sampling: settings with a temperature above 0.
    """
    logits = logits / sampling.temperature
    if sampling.top_k:
        k = min(sampling.top_k, logits.shape[-1])
        logits = jnp.where(logits < jax.lax.top_k(logits, k)[0][..., -1:], -jnp.inf, logits)
    if sampling.top_p < 1:
        ordered = -jnp.sort(-logits, axis=-1)
        share = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(share, axis=-1) - share  # probability of all likelier tokens
        lowest = jnp.where(before < sampling.top_p, ordered, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    if sampling.min_p:
        floor = logits.max(-1, keepdims=True) + jnp.log(sampling.min_p)
        logits = jnp.where(logits < floor, -jnp.inf, logits)
    return logits


def choose(
    logits: jax.Array, sampling: Sampling, keys: jax.Array, step: int | jax.Array
) -> jax.Array:
    """Draws the next token of each row, int32 `[rows]`.

    Args:
      logits: `[rows, vocab]`.
      sampling: how tokens are drawn.
      keys: PRNG keys `[rows]`.
      step: number of the token within the answer, folded into the keys.
    """
    if sampling.temperature == 0:
        # Two plain reductions: XLA's argmax takes four times as long on CPU.
        ids = jnp.arange(logits.shape[-1], dtype=jnp.int32)
        best = logits == logits.max(-1, keepdims=True)
        return jnp.where(best, ids, logits.shape[-1] - 1).min(-1)
    step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
    draw = jax.vmap(jax.random.categorical)
    return draw(step_keys, restrict(logits, sampling)).astype(jnp.int32)
