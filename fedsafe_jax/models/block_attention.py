"""Attention on CPU that computes only the blocks of keys which a block of queries may see.

Packed rows hold many short examples, so most of a row's `seq x seq` scores are masked out. Rows are
cut into blocks of tokens; the pairs of blocks that share a segment, causally and within the window,
are put on a list, and a loop works the list off with a running softmax (Dao et al., 2022), forwards
and backwards. The list's length is data, its capacity is not, so nothing is compiled anew. XLA has
no such kernel for CPU; on GPU and TPU cuDNN and splash attention do the same.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedsafe_jax.models.flatten_vmap import flatten_vmap

BLOCK = 64
SHORTEST = 256  # of rows; below, all blocks of a row together are as fast
NEVER = -1e30


class _Blocks(NamedTuple):
    """Segments and positions of every block, int32 `[blocks, BLOCK]`."""

    segments: jax.Array
    positions: jax.Array


class _List(NamedTuple):
    """Pairs of blocks in order of the queries': int32 `[capacity]` each, `count` are used."""

    queries: jax.Array
    keys: jax.Array
    count: jax.Array


def attend(query, key, value, segments, window: int, scale: float, softcap: float | None = None):
    """Causal grouped-query attention within segments.

    Args:
      query: `[batch, seq, heads, head_dim]`.
      key, value: `[batch, seq, kv_heads, head_dim]`.
      segments: int32 `[batch, seq]`; the tokens of a segment lie side by side.
      window: hides keys that many positions back; 0 for none.
      scale: factor of the query-key products.
      softcap: `cap * tanh(score / cap)` before the softmax, or None.

    Returns:
      `[batch, seq, heads, head_dim]` in the dtype of `query`.
    """
    seq, dtype = query.shape[1], query.dtype
    missing = -seq % BLOCK

    def padded(x, value=0):
        pad = [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, pad, constant_values=value)

    inputs = [padded(x.astype(jnp.float32)) for x in (query * scale, key, value)]
    out = _attention(*inputs, padded(segments, -1), window, softcap)
    return out[:, :seq].astype(dtype)


def _cut(x):
    """`[batch, seq, heads, head_dim]` to `[blocks, heads, BLOCK, head_dim]`."""
    batch, seq, heads, dim = x.shape
    x = x.reshape(batch, seq // BLOCK, BLOCK, heads, dim).swapaxes(2, 3)
    return x.reshape(-1, heads, BLOCK, dim)


def _joined(x, batch: int):
    blocks, heads, _, dim = x.shape
    x = x.reshape(batch, blocks // batch, heads, BLOCK, dim).swapaxes(2, 3)
    return x.reshape(batch, -1, heads, dim)


def _visible(segments, window: int) -> tuple[_Blocks, _List]:
    batch, seq = segments.shape
    count, places = seq // BLOCK, jnp.arange(seq)
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    starts = jax.lax.cummax(jnp.where(begins, places, 0), axis=1)
    # The first token of a block looks back furthest: to where its segment begins.
    lowest = starts[:, ::BLOCK] // BLOCK
    if window:
        lowest = jnp.maximum(lowest, (jnp.arange(count) * BLOCK - window + 1) // BLOCK)
    numbers = (jnp.arange(count) - lowest + 1).reshape(-1)
    ends = jnp.cumsum(numbers)
    item = jnp.arange(batch * count * (count + 1) // 2)
    queries = jnp.minimum(jnp.searchsorted(ends, item, side="right"), batch * count - 1)
    keys = lowest.reshape(-1)[queries] + item - (ends - numbers)[queries]
    keys += queries // count * count
    positions = jnp.broadcast_to(places, segments.shape).reshape(-1, BLOCK)
    listed = _List(queries.astype(jnp.int32), keys.astype(jnp.int32), ends[-1])
    return _Blocks(segments.reshape(-1, BLOCK), positions), listed


def _scores(query, key, i, j, blocks: _Blocks, window: int, softcap):
    """Scores float32 `[heads, BLOCK, BLOCK]` of a pair of blocks, and which of them count."""
    heads, kv_heads = query.shape[1], key.shape[1]
    grouped = query[i].reshape(kv_heads, -1, query.shape[-1])
    scores = jnp.einsum("kqd,ksd->kqs", grouped, key[j]).reshape(heads, BLOCK, BLOCK)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    mine, theirs = blocks.positions[i][:, None], blocks.positions[j][None, :]
    seen = (blocks.segments[i][:, None] == blocks.segments[j][None, :]) & (theirs <= mine)
    if window:
        seen &= theirs > mine - window
    return scores, seen


def _update(array, value, index):
    return jax.lax.dynamic_update_index_in_dim(array, value, index, 0)


def _forward(query, key, value, segments, window, softcap):
    """Output and log of the softmax's sum, by block of queries."""
    query, key, value = map(_cut, (query, key, value))
    blocks, listed = _visible(segments, window)
    heads, dim, kv_heads = query.shape[1], query.shape[-1], key.shape[1]

    def body(state):
        item, most, total, mixed, out, log_sum = state
        i, j = listed.queries[item], listed.keys[item]
        begins = (item == 0) | (listed.queries[jnp.maximum(item - 1, 0)] != i)
        most = jnp.where(begins, NEVER, most)
        total, mixed = jnp.where(begins, 0.0, total), jnp.where(begins, 0.0, mixed)
        scores, seen = _scores(query, key, i, j=j, blocks=blocks, window=window, softcap=softcap)
        higher = jnp.maximum(most, jnp.where(seen, scores, NEVER).max(-1))
        weights = jnp.where(seen, jnp.exp(scores - higher[..., None]), 0.0)
        kept = jnp.exp(most - higher)
        total = total * kept + weights.sum(-1)
        grouped = weights.reshape(kv_heads, -1, BLOCK)
        new = jnp.einsum("kqs,ksd->kqd", grouped, value[j]).reshape(heads, BLOCK, dim)
        mixed = mixed * kept[..., None] + new
        # Written after every pair: the last one, of the block with itself, is what stays.
        out = _update(out, mixed / jnp.maximum(total, 1e-30)[..., None], i)
        log_sum = _update(log_sum, higher + jnp.log(jnp.maximum(total, 1e-30)), i)
        return item + 1, higher, total, mixed, out, log_sum

    flat = jnp.zeros((heads, BLOCK))
    start = (0, flat, flat, jnp.zeros((heads, BLOCK, dim)), jnp.zeros_like(query))
    start += (jnp.zeros(query.shape[:-1]),)
    *_, out, log_sum = jax.lax.while_loop(lambda s: s[0] < listed.count, body, start)
    batch = len(segments)
    return _joined(out, batch), log_sum.reshape(batch, -1, heads, BLOCK)


def _backward(query, key, value, segments, out, log_sum, grad, window, softcap):
    batch = len(segments)
    query, key, value, out, grad = map(_cut, (query, key, value, out, grad))
    blocks, listed = _visible(segments, window)
    heads, dim, kv_heads = query.shape[1], query.shape[-1], key.shape[1]
    log_sum = log_sum.reshape(-1, heads, BLOCK)
    dot = (grad * out).sum(-1)

    def body(state):
        item, d_query, d_key, d_value = state
        i, j = listed.queries[item], listed.keys[item]
        scores, seen = _scores(query, key, i, j=j, blocks=blocks, window=window, softcap=softcap)
        weights = jnp.where(seen, jnp.exp(scores - log_sum[i][..., None]), 0.0)
        g = grad[i].reshape(kv_heads, -1, dim)
        d_weights = jnp.einsum("kqd,ksd->kqs", g, value[j]).reshape(heads, BLOCK, BLOCK)
        d_scores = weights * (d_weights - dot[i][..., None])
        if softcap is not None:
            d_scores *= 1 - jnp.square(scores / softcap)
        d_scores, weights = (x.reshape(kv_heads, -1, BLOCK) for x in (d_scores, weights))
        mine = jnp.einsum("kqs,ksd->kqd", d_scores, key[j]).reshape(heads, BLOCK, dim)
        grouped = query[i].reshape(kv_heads, -1, dim)
        d_query = _update(d_query, d_query[i] + mine, i)
        d_key = _update(d_key, d_key[j] + jnp.einsum("kqs,kqd->ksd", d_scores, grouped), j)
        d_value = _update(d_value, d_value[j] + jnp.einsum("kqs,kqd->ksd", weights, g), j)
        return item + 1, d_query, d_key, d_value

    start = (0, *map(jnp.zeros_like, (query, key, value)))
    _, *found = jax.lax.while_loop(lambda s: s[0] < listed.count, body, start)
    return tuple(_joined(x, batch) for x in found)


@functools.lru_cache
def _programs(window: int, softcap: float | None):
    forward = flatten_vmap(functools.partial(_forward, window=window, softcap=softcap))
    backward = flatten_vmap(functools.partial(_backward, window=window, softcap=softcap))
    return forward, backward


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(query, key, value, segments, window, softcap):
    return _programs(window, softcap)[0](query, key, value, segments)[0]


def _attention_forward(query, key, value, segments, window, softcap):
    out, log_sum = _programs(window, softcap)[0](query, key, value, segments)
    return out, (query, key, value, segments, out, log_sum)


def _attention_backward(window, softcap, kept, grad):
    return *_programs(window, softcap)[1](*kept, grad), None


_attention.defvjp(_attention_forward, _attention_backward)
