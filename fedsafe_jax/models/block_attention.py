"""Attention on CPU that computes only the blocks of keys that a block of queries may see.

Packed rows hold many short examples, so most of a row's `seq x seq` scores are masked out. Rows are
cut into blocks of tokens, and a list is made of the pairs of blocks that share a segment, causally
and within the window. A loop works off the list with a running softmax (FlashAttention, arXiv
2205.14135), in the forward and the backward pass, all in float32. The list's length is data, its
capacity is not, so a new batch compiles nothing. XLA has no such kernel for CPU; GPU and TPU have
those of `attention_kernels`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedsafe_jax.models.flatten_vmap import flatten_vmap

BLOCK = 64  # tokens of a block
MIN_SEQ = 256  # Rows shorter than this are as fast with dense scores.
NEVER = -1e30  # Score of a masked pair; -inf would give NaN where a block has no visible key.


class _Blocks(NamedTuple):
    """Segments and positions of every block of tokens, int32 `[blocks, BLOCK]`.

    Here and below, `blocks` counts the blocks of all rows: `batch * seq / BLOCK`.
    """

    segments: jax.Array
    positions: jax.Array


class _Pairs(NamedTuple):
    """List of visible pairs of blocks, sorted by the block of queries.

    Attributes:
      queries, keys: int32 `[capacity]`, index of each pair's block of queries and of keys.
      count: int32 scalar, length of the list; entries behind it are not used.
    """

    queries: jax.Array
    keys: jax.Array
    count: jax.Array


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array,
    window: int,
    scale: float,
    softcap: float | None = None,
) -> jax.Array:
    """Computes causal grouped-query attention within segments.

    Args:
      query: `[batch, seq, heads, head_dim]`.
      key, value: `[batch, seq, kv_heads, head_dim]`.
      segments: int32 `[batch, seq]`; the tokens of a segment lie side by side.
      window: number of positions that a query sees, its own included; 0 for all before it.
      scale: factor of the query-key products.
      softcap: `cap * tanh(score / cap)` before the softmax, or None.

    Returns:
      `[batch, seq, heads, head_dim]` in the dtype of `query`.
    """
    seq, dtype = query.shape[1], query.dtype

    def pad(x, value=0):
        widths = [(0, 0), (0, -seq % BLOCK)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, widths, constant_values=value)

    inputs = [pad(x.astype(jnp.float32)) for x in (query * scale, key, value)]
    # The padding is a segment of its own, which no token sees.
    out = _attention(*inputs, pad(segments, -1), window, softcap)
    return out[:, :seq].astype(dtype)


def _to_blocks(x):
    """Reshapes `[batch, seq, heads, head_dim]` to `[blocks, heads, BLOCK, head_dim]`."""
    batch, seq, heads, dim = x.shape
    x = x.reshape(batch, seq // BLOCK, BLOCK, heads, dim).swapaxes(2, 3)
    return x.reshape(-1, heads, BLOCK, dim)


def _from_blocks(x, batch: int):
    """Undoes `_to_blocks`."""
    blocks, heads, _, dim = x.shape
    x = x.reshape(batch, blocks // batch, heads, BLOCK, dim).swapaxes(2, 3)
    return x.reshape(batch, -1, heads, dim)


def _visible_pairs(segments, window: int) -> tuple[_Blocks, _Pairs]:
    """Lists the pairs of blocks with a visible key; `segments` is int32 `[batch, seq]`."""
    batch, seq = segments.shape
    blocks_per_row, places = seq // BLOCK, jnp.arange(seq)
    is_start = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    starts = jax.lax.cummax(jnp.where(is_start, places, 0), axis=1)
    # The first token of a block looks back furthest: to where its segment begins.
    first_key = starts[:, ::BLOCK] // BLOCK
    if window:
        first_key = jnp.maximum(
            first_key, (jnp.arange(blocks_per_row) * BLOCK - window + 1) // BLOCK
        )
    # Each block of queries has a run of pairs on the list, from its first key block to itself.
    run_lengths = (jnp.arange(blocks_per_row) - first_key + 1).reshape(-1)
    run_ends = jnp.cumsum(run_lengths)
    item = jnp.arange(batch * blocks_per_row * (blocks_per_row + 1) // 2)
    queries = jnp.searchsorted(run_ends, item, side="right")
    queries = jnp.minimum(queries, batch * blocks_per_row - 1)
    keys = first_key.reshape(-1)[queries] + item - (run_ends - run_lengths)[queries]
    keys += queries // blocks_per_row * blocks_per_row
    positions = jnp.broadcast_to(places, segments.shape).reshape(-1, BLOCK)
    pairs = _Pairs(queries.astype(jnp.int32), keys.astype(jnp.int32), run_ends[-1])
    return _Blocks(segments.reshape(-1, BLOCK), positions), pairs


def _scores(query, key, i, j, blocks: _Blocks, window: int, softcap):
    """Computes the scores of query block `i` with key block `j`.

    Args:
      query: float32 `[blocks, heads, BLOCK, head_dim]`.
      key: float32 `[blocks, kv_heads, BLOCK, head_dim]`.
      i, j: int32 scalars.
      blocks: segments and positions.
      window, softcap: as in `attend`.

    Returns:
      `(scores float32 [heads, BLOCK, BLOCK], is_visible bool [BLOCK, BLOCK])`.
    """
    heads, kv_heads = query.shape[1], key.shape[1]
    grouped = query[i].reshape(kv_heads, -1, query.shape[-1])
    scores = jnp.einsum("kqd,ksd->kqs", grouped, key[j]).reshape(heads, BLOCK, BLOCK)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    query_at, key_at = blocks.positions[i][:, None], blocks.positions[j][None, :]
    is_same = blocks.segments[i][:, None] == blocks.segments[j][None, :]
    is_visible = is_same & (key_at <= query_at)
    if window:
        is_visible &= key_at > query_at - window
    return scores, is_visible


def _update(array, value, index):
    return jax.lax.dynamic_update_index_in_dim(array, value, index, 0)


@jax.default_matmul_precision("float32")
def _forward(query, key, value, segments, window, softcap):
    """Computes attention; arguments as in `attend`, float32, `seq` a multiple of `BLOCK`.

    Returns:
      `(out [batch, seq, heads, head_dim], log_sum [batch, seq/BLOCK, heads, BLOCK])`, where
      `log_sum` is the logarithm of each softmax's denominator.
    """
    query, key, value = map(_to_blocks, (query, key, value))
    blocks, pairs = _visible_pairs(segments, window)
    heads, dim, kv_heads = query.shape[1], query.shape[-1], key.shape[1]

    def add_pair(state):
        item, highest, total, weighted, out, log_sum = state
        i, j = pairs.queries[item], pairs.keys[item]
        # The running softmax starts anew with each block of queries.
        is_first = (item == 0) | (pairs.queries[jnp.maximum(item - 1, 0)] != i)
        highest = jnp.where(is_first, NEVER, highest)
        total, weighted = jnp.where(is_first, 0.0, total), jnp.where(is_first, 0.0, weighted)
        scores, is_visible = _scores(
            query, key, i, j=j, blocks=blocks, window=window, softcap=softcap
        )
        new_highest = jnp.maximum(highest, jnp.where(is_visible, scores, NEVER).max(-1))
        weights = jnp.where(is_visible, jnp.exp(scores - new_highest[..., None]), 0.0)
        rescale = jnp.exp(highest - new_highest)
        total = total * rescale + weights.sum(-1)
        grouped = weights.reshape(kv_heads, -1, BLOCK)
        new = jnp.einsum("kqs,ksd->kqd", grouped, value[j]).reshape(heads, BLOCK, dim)
        weighted = weighted * rescale[..., None] + new
        # Written after every pair; the last pair of a block of queries, with itself, is the value
        # that stays.
        out = _update(out, weighted / jnp.maximum(total, 1e-30)[..., None], i)
        log_sum = _update(log_sum, new_highest + jnp.log(jnp.maximum(total, 1e-30)), i)
        return item + 1, new_highest, total, weighted, out, log_sum

    flat = jnp.zeros((heads, BLOCK))
    start = (0, flat, flat, jnp.zeros((heads, BLOCK, dim)), jnp.zeros_like(query))
    start += (jnp.zeros(query.shape[:-1]),)
    *_, out, log_sum = jax.lax.while_loop(lambda s: s[0] < pairs.count, add_pair, start)
    batch = len(segments)
    return _from_blocks(out, batch), log_sum.reshape(batch, -1, heads, BLOCK)


@jax.default_matmul_precision("float32")
def _backward(query, key, value, segments, out, log_sum, grad, window, softcap):
    """Computes the gradients with respect to query, key and value, in their shapes.

    Args:
      query, key, value, segments, window, softcap: as in `_forward`.
      out, log_sum: what `_forward` returned.
      grad: cotangent of `out`.
    """
    batch = len(segments)
    query, key, value, out, grad = map(_to_blocks, (query, key, value, out, grad))
    blocks, pairs = _visible_pairs(segments, window)
    heads, dim, kv_heads = query.shape[1], query.shape[-1], key.shape[1]
    log_sum = log_sum.reshape(-1, heads, BLOCK)
    dot = (grad * out).sum(-1)

    def add_pair(state):
        item, d_query, d_key, d_value = state
        i, j = pairs.queries[item], pairs.keys[item]
        scores, is_visible = _scores(
            query, key, i, j=j, blocks=blocks, window=window, softcap=softcap
        )
        weights = jnp.where(is_visible, jnp.exp(scores - log_sum[i][..., None]), 0.0)
        d_out = grad[i].reshape(kv_heads, -1, dim)
        d_weights = jnp.einsum("kqd,ksd->kqs", d_out, value[j]).reshape(heads, BLOCK, BLOCK)
        d_scores = weights * (d_weights - dot[i][..., None])
        if softcap is not None:
            d_scores *= 1 - jnp.square(scores / softcap)
        d_scores, weights = (x.reshape(kv_heads, -1, BLOCK) for x in (d_scores, weights))
        new = jnp.einsum("kqs,ksd->kqd", d_scores, key[j]).reshape(heads, BLOCK, dim)
        grouped = query[i].reshape(kv_heads, -1, dim)
        d_query = _update(d_query, d_query[i] + new, i)
        d_key = _update(d_key, d_key[j] + jnp.einsum("kqs,kqd->ksd", d_scores, grouped), j)
        d_value = _update(d_value, d_value[j] + jnp.einsum("kqs,kqd->ksd", weights, d_out), j)
        return item + 1, d_query, d_key, d_value

    start = (0, *map(jnp.zeros_like, (query, key, value)))
    _, *gradients = jax.lax.while_loop(lambda s: s[0] < pairs.count, add_pair, start)
    return tuple(_from_blocks(x, batch) for x in gradients)


@functools.lru_cache
def _programs(window: int, softcap: float | None):
    """Returns `_forward` and `_backward` with a rule for `vmap`; arrays `[batch, ...]` are rows."""
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
