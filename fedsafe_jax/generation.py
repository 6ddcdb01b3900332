"""Batched generation: bucketed prefill, then a `lax.while_loop` over a KV cache."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fedsafe_jax.models.decoder import Decoder, empty_cache

BUCKET_TOKENS = 32  # prompts are left-padded to a multiple of this


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens", "top_k"))
def _generate(
    model, params, adapter, tokens, valid, stop_ids, key, temperature, max_new_tokens, top_k
):
    batch, prompt_len = tokens.shape
    variables = {"params": params} | ({"lora": adapter} if adapter is not None else {})
    cache = empty_cache(model.config, batch, prompt_len + max_new_tokens)
    positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
    hidden, cache = model.apply(variables, tokens, positions, None, cache, valid)
    last_position = positions[:, -1]

    def choose(hidden, step):
        logits = model.apply(variables, hidden, method="unembed")

        def sample():
            scaled = logits / jnp.maximum(temperature, 1e-6)
            if top_k:
                lowest = jax.lax.top_k(scaled, top_k)[0][:, -1:]
                scaled = jnp.where(scaled < lowest, -jnp.inf, scaled)
            return jax.random.categorical(jax.random.fold_in(key, step), scaled)

        return jax.lax.cond(temperature > 0, sample, lambda: jnp.argmax(logits, -1)).astype(
            jnp.int32
        )

    def unfinished(state):
        step, _, _, done, _ = state
        return (step < max_new_tokens) & ~done.all()

    def extend(state):
        step, token, out, done, cache = state
        out = jax.lax.dynamic_update_slice(out, jnp.where(done, -1, token)[:, None], (0, step))
        done = done | jnp.isin(token, stop_ids)
        positions = (last_position + 1 + step)[:, None]
        hidden, cache = model.apply(
            variables, token[:, None], positions, None, cache, jnp.ones((batch, 1), bool)
        )
        return step + 1, choose(hidden[:, -1], step + 1), out, done, cache

    out = jnp.full((batch, max_new_tokens), -1, jnp.int32)
    done = ~valid.any(axis=1)  # rows that only fill up the batch
    state = (jnp.zeros((), jnp.int32), choose(hidden[:, -1], 0), out, done, cache)
    _, _, out, done, _ = jax.lax.while_loop(unfinished, extend, state)
    return out, done


def generate_ids(
    model: Decoder,
    params,
    adapter,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    max_new_tokens: int,
    key: jax.Array,
    temperature: float = 0.0,
    top_k: int = 0,
    batch_size: int = 64,
) -> tuple[list[list[int]], np.ndarray]:
    """Continues tokenised prompts.

    Prompts are sorted by length into batches, so that each batch is padded to its own bucket;
    answers come back in the order given.

    Args:
      model: the decoder.
      params: base parameters.
      adapter: LoRA factors, or None for the base model.
      prompts: token ids of each prompt.
      stop_ids: tokens that end an answer.
      max_new_tokens: longest answer.
      key: random key; greedy generation ignores it.
      temperature: 0 is greedy.
      top_k: sample among the k likeliest tokens; 0 for all.
      batch_size: rows decoded at once.

    Returns:
      `(answers without the stop token, finished bool [n])`; an answer that is not finished was cut
      at `max_new_tokens`.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: list[list[int]] = [[] for _ in prompts]
    finished = np.zeros(len(prompts), bool)
    stops = jnp.asarray(stop_ids, jnp.int32)
    for number, start in enumerate(range(0, len(order), batch_size)):
        rows = order[start : start + batch_size]
        longest = max(len(prompts[i]) for i in rows)
        width = -(-longest // BUCKET_TOKENS) * BUCKET_TOKENS
        tokens = np.zeros((batch_size, width), np.int32)
        valid = np.zeros((batch_size, width), bool)
        for row, i in enumerate(rows):
            tokens[row, width - len(prompts[i]) :] = prompts[i]
            valid[row, width - len(prompts[i]) :] = True
        out, done = jax.device_get(
            _generate(
                model, params, adapter, tokens, valid, stops, jax.random.fold_in(key, number),
                jnp.float32(temperature), max_new_tokens, top_k,
            )
        )  # fmt: skip
        for row, i in enumerate(rows):
            ids = [int(t) for t in out[row] if t >= 0]
            answers[i] = ids[:-1] if ids and ids[-1] in stop_ids else ids
            finished[i] = done[row]
    return answers, finished
