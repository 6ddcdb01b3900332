"""The compiled programs of a search for suffixes: losses of targets, and gradients by tokens.

What stands before the suffix is read once for a request; its keys and values are shared by all
suffixes, and by the gradient, which does not change them.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedsafe_jax.data import packing
from fedsafe_jax.inference.language_model import LanguageModel
from fedsafe_jax.models.cache import KVCache, empty_cache, grow_cache
from fedsafe_jax.models.decoder import Decoder, target_nll

Models = tuple[Decoder, ...]


class Behind(NamedTuple):
    """A request as a model has read it, up to the suffix, and what stands behind it.

    Attributes:
      cache: keys and values of the tokens before the suffix, one row, padded on the left.
      read: int32 scalar, tokens before the suffix.
      tail: int32 `[targets, tail]`, the rest of the prompt and a target, padded on the right.
      first: int32 scalar, place of the targets in `tail`.
      targets: int32 `[targets, longest]`, padded on the right.
      lengths: int32 `[targets]`, tokens of each.
    """

    cache: KVCache
    read: jax.Array
    tail: jax.Array
    first: jax.Array
    targets: jax.Array
    lengths: jax.Array


def variables_of(lm: LanguageModel) -> dict[str, Any]:
    """Returns a model's parameters and factors, as its decoder takes them."""
    return {"params": lm.params} | ({} if lm.adapter is None else {"lora": lm.factors})


def read_before(
    lm: LanguageModel,
    before: Sequence[int],
    after: Sequence[int],
    targets: Sequence[Sequence[int]],
) -> Behind:
    """Reads the tokens before a suffix.

    Args:
      lm: the model, on one device.
      before, after: token ids around the suffix.
      targets: token ids of the beginnings of answers.
    """
    seq, lengths = packing.round_up(len(before)), [len(x) for x in targets]
    tokens, positions, segments = (np.zeros((1, seq), np.int32) for _ in range(3))
    tokens[0, seq - len(before) :] = before
    positions[0, seq - len(before) :] = np.arange(len(before))
    segments[0, seq - len(before) :] = 1
    longest = packing.round_up(max(lengths), 8)
    padded = np.zeros((len(targets), longest), np.int32)
    tail = np.zeros((len(targets), packing.round_up(len(after) + longest)), np.int32)
    for i, target in enumerate(targets):
        padded[i, : len(target)] = target
        tail[i, : len(after) + len(target)] = [*after, *target]
    cache = _read(lm.model, variables_of(lm), tokens, positions, segments)
    return Behind(
        cache,
        read=jnp.int32(len(before)),
        tail=jnp.asarray(tail),
        first=jnp.int32(len(after)),
        targets=jnp.asarray(padded),
        lengths=jnp.asarray(lengths, jnp.int32),
    )


@functools.partial(jax.jit, static_argnums=0)
def _read(model: Decoder, variables, tokens, positions, segments) -> KVCache:
    cache = empty_cache(model.config, *tokens.shape)
    return model.apply(variables, tokens, positions, segments, cache, segments > 0)[1]


def _loss(model: Decoder, variables, behind: Behind, suffixes: jax.Array) -> jax.Array:
    """Returns the mean loss of the targets, float32 `[rows]`, in nats a token.

    `suffixes` are int32 `[rows, length]`, or float `[rows, length, vocab]`.
    """
    (rows, length), (count, width) = suffixes.shape[:2], behind.tail.shape
    batch, seq = rows * count, length + width
    tail = behind.tail
    if suffixes.ndim == 3:
        tail = jax.nn.one_hot(tail, suffixes.shape[2], dtype=suffixes.dtype)
    tokens = jnp.concatenate(
        [jnp.repeat(suffixes, count, axis=0), jnp.tile(tail, (rows,) + (1,) * (tail.ndim - 1))],
        axis=1,
    )
    inside = jnp.arange(width) < (behind.first + behind.lengths)[:, None]
    valid = jnp.concatenate([jnp.ones((batch, length), bool), jnp.tile(inside, (rows, 1))], axis=1)
    positions = jnp.broadcast_to(behind.read + jnp.arange(seq), (batch, seq))
    hidden, _ = model.apply(
        variables, tokens, positions, None, _spread(behind.cache, batch, seq), valid
    )
    # The token before each target's first one predicts it.
    longest = behind.targets.shape[1]
    hidden = jax.lax.dynamic_slice_in_dim(hidden, length + behind.first - 1, longest, axis=1)
    nll = target_nll(
        model,
        variables["params"],
        hidden.reshape(-1, hidden.shape[-1]),
        jnp.tile(behind.targets, (rows, 1)).reshape(-1),
    ).reshape(rows, count, longest)
    said = jnp.arange(longest) < behind.lengths[:, None]
    return (jnp.where(said, nll, 0.0).sum(-1) / behind.lengths).mean(-1)


def _spread(cache: KVCache, batch: int, more: int) -> KVCache:
    """Returns a cache of one row for all rows of a batch, with `more` free slots."""

    def widen(x, axis):
        return jnp.broadcast_to(x, (*x.shape[:axis], batch, *x.shape[axis + 1 :]))

    key, value, valid = widen(cache.key, 1), widen(cache.value, 1), widen(cache.valid, 0)
    return grow_cache(KVCache(key, value, valid, cache.length), cache.valid.shape[1] + more)


def _mean_loss(models: Models, variables, behind, suffixes) -> jax.Array:
    """Returns the mean over several models of `_loss`."""
    each = [_loss(*one, suffixes) for one in zip(models, variables, behind, strict=True)]
    return sum(each) / len(each)


@functools.partial(jax.jit, static_argnums=0)
def losses(
    models: Models, variables: tuple[dict, ...], behind: tuple[Behind, ...], suffixes: jax.Array
) -> jax.Array:
    """Returns the loss of each suffix, float32 `[parts, rows]`, the mean over models and targets.

    Args:
      models: decoders; static.
      variables: parameters and factors of each.
      behind: the request, as each has read it.
      suffixes: int32 `[parts, rows, length]`; a part is scored at once.
    """
    return jax.lax.map(lambda part: _mean_loss(models, variables, behind, part), suffixes)


@functools.partial(jax.jit, static_argnums=0)
def gradient(
    models: Models, variables: tuple[dict, ...], behind: tuple[Behind, ...], suffix: jax.Array
) -> jax.Array:
    """Returns the gradient of the loss by the one-hot rows of a suffix, float32 `[length, vocab]`.

    Args:
      models, variables, behind: as in `losses`.
      suffix: int32 `[length]`.
    """
    rows = jax.nn.one_hot(suffix, models[0].config.vocab_size, dtype=jnp.float32)
    return jax.grad(lambda x: _mean_loss(models, variables, behind, x[None])[0])(rows)
