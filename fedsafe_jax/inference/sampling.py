"""How the next token is drawn from logits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sampling(NamedTuple):
    """How the next token is drawn; static, so that each setting is compiled once.

    Attributes:
      temperature: 0 is greedy, and ignores the rest.
      top_k: draw among the k likeliest tokens; 0 for all.
      top_p: draw among the likeliest tokens that together have this probability (Holtzman et al.,
        2020); 1 for all.
      min_p: draw among tokens at least so likely relative to the likeliest (Nguyen et al., 2024);
        0 for all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


GREEDY = Sampling()


def restrict(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits `[..., vocab]` over the temperature, -inf where `sampling` excludes a token.

    Filters apply in the order of transformers: temperature, top-k, top-p, min-p.
    """
    logits = logits / sampling.temperature
    if sampling.top_k:
        k = min(sampling.top_k, logits.shape[-1])
        logits = jnp.where(logits < jax.lax.top_k(logits, k)[0][..., -1:], -jnp.inf, logits)
    if sampling.top_p < 1:
        ordered = -jnp.sort(-logits, axis=-1)
        share = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(share, axis=-1) - share  # probability of what is likelier
        lowest = jnp.where(before < sampling.top_p, ordered, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    if sampling.min_p:
        floor = logits.max(-1, keepdims=True) + jnp.log(sampling.min_p)
        logits = jnp.where(logits < floor, -jnp.inf, logits)
    return logits


def choose(logits: jax.Array, sampling: Sampling, keys: jax.Array, step) -> jax.Array:
    """The next token of each row, int32 `[rows]`, from logits `[rows, vocab]` and a key a row."""
    if sampling.temperature == 0:
        # Two plain reductions: XLA's argmax takes four times as long on CPU.
        ids = jnp.arange(logits.shape[-1], dtype=jnp.int32)
        best = logits == logits.max(-1, keepdims=True)
        return jnp.where(best, ids, logits.shape[-1] - 1).min(-1)
    step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
    draw = jax.vmap(jax.random.categorical)
    return draw(step_keys, restrict(logits, sampling)).astype(jnp.int32)
