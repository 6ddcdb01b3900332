"""The compiled programs of generation: packed prefill, extending a prefix cache, and decoding.

Decoding is a `lax.while_loop` over a KV cache that grows between calls. It is compiled for each
length of the cache, whatever the lengths of the prompts are.
"""

import functools
import weakref
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fedsafe_jax.inference.decoding_state import Specs, State, Steering, split_rows
from fedsafe_jax.inference.prompt_packing import Packed
from fedsafe_jax.inference.sampling import Sampling, choose
from fedsafe_jax.models.cache import (
    KVCache,
    empty_cache,
    grow_cache,
    spread_cache,
    unrolls,
    unstack,
)
from fedsafe_jax.models.decoder import Decoder
from fedsafe_jax.models.decoder_config import DecoderConfig
from fedsafe_jax.models.owned_lora import Owned, for_layers
from fedsafe_jax.models.sharding import is_shared, share

# The axes of a cache that `vmap` maps over adapters: all adapters' caches have the same length.
CACHE_AXES = KVCache(0, 0, 0, None)


def _variables(params, factors):
    if isinstance(factors, Owned):
        factors = for_layers(factors)
    return {"params": params} | ({"lora": factors} if factors is not None else {})


def _prefill(model: Decoder, stacked: bool, params, factors, packed: Packed):
    """Reads packed prompts; see `prefill_program`."""

    def read(factors):
        rows, seq = packed.tokens.shape
        cache, inside = empty_cache(model.config, rows, seq), packed.segment_ids > 0
        hidden, cache = model.apply(
            _variables(params, factors), packed.tokens, packed.positions, packed.segment_ids,
            cache, inside,
        )  # fmt: skip
        last = hidden.reshape(-1, hidden.shape[-1])[packed.last]
        logits = model.apply(_variables(params, None), last, method="unembed")
        return logits, spread_cache(model.config, cache, packed.source, packed.valid, packed.width)

    if stacked:
        # Only the LoRA factors are mapped: a product with a base weight stays one large product
        # over the rows of all adapters.
        return jax.vmap(read, out_axes=(0, CACHE_AXES))(factors)
    logits, cache = read(factors)
    return logits[None], cache


def _next_token(sampling: Sampling, logits, keys, step):
    """Chooses the tokens at `step`, int32 `[groups, rows]`, from logits `[groups, rows, vocab]`."""
    flat = logits.reshape(-1, logits.shape[-1])
    return choose(flat, sampling, keys.reshape(-1), step).reshape(keys.shape)


def _steered(sampling: Sampling, steering: Steering | None, logits, done, keys, step):
    """Chooses as `_next_token`, with the bias of a search: `(tokens, steering)`."""
    if steering is None:
        return _next_token(sampling, logits, keys, step), None
    token = _next_token(sampling, logits + steering.bias, keys, step)
    return token, steering._replace(
        log_prob=steering.log_prob + token_log_prob(logits, token, done)
    )


def token_log_prob(logits: jax.Array, token: jax.Array, done: jax.Array) -> jax.Array:
    """Returns the log-probability of tokens, float32 `[groups, rows]`; 0 of answers that are done.

    Args:
      logits: `[groups, rows, vocab]`.
      token: int32 `[groups, rows]`.
      done: bool `[groups, rows]`.
    """
    chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    return jnp.where(done, 0.0, chosen - jax.nn.logsumexp(logits, axis=-1))


@functools.partial(jax.jit, static_argnums=(0, 1))
def start(
    sampling: Sampling,
    max_new_tokens: int,
    logits: jax.Array,
    prompt_len: jax.Array,
    keys: jax.Array,
    stop_ids: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Chooses the first token of each answer.

    Args:
      sampling: how tokens are drawn; static.
      max_new_tokens: width of `State.out`; static.
      logits: `[groups, rows, vocab]` of the prompts' last tokens.
      prompt_len: int32 `[rows]`, 0 for rows that hold no prompt.
      keys: PRNG keys `[groups, rows]`.
      stop_ids: int32 `[stop_tokens]`.

    Returns:
      `(token, out, done)` of a `State`.
    """
    token = _next_token(sampling, logits, keys, 0)
    # Rows without a prompt only fill up the batch: they are done before they begin.
    empty = jnp.broadcast_to(prompt_len == 0, token.shape)
    out = jnp.full((*token.shape, max_new_tokens), -1, jnp.int32)
    out = out.at[..., 0].set(jnp.where(empty, -1, token))
    return token, out, empty | jnp.isin(token, stop_ids)


def _decode(
    model: Decoder, sampling: Sampling, stacked: bool,
    params, factors, state: State, prompt_len, step, keys, stop_ids,
):  # fmt: skip
    """Decodes until the cache is full or all answers are done; see `decode_program`."""
    config, (_, rows, max_new_tokens) = model.config, state.out.shape
    if isinstance(factors, Owned):
        factors = for_layers(factors)
    if unrolls(config):
        factors = factors and unstack(factors, config.num_layers, axis=int(stacked))
    new = jnp.ones((rows, 1), bool)

    def read(factors, tokens, positions, cache):
        variables = _variables(params, factors)
        hidden, cache = model.apply(variables, tokens[:, None], positions, None, cache, new)
        return model.apply(variables, hidden[:, -1], method="unembed"), cache

    def step_logits(tokens, positions, cache):
        if stacked:
            mapped = jax.vmap(read, (0, 0, None, CACHE_AXES), (0, CACHE_AXES))
            return mapped(factors, tokens, positions, cache)
        logits, cache = read(factors, tokens[0], positions, cache)
        return logits[None], cache

    def write_token(carry):
        step, (token, out, done, cache, steering) = carry
        logits, cache = step_logits(token, (prompt_len + step - 1)[:, None], cache)
        token, steering = _steered(sampling, steering, logits, done=done, keys=keys, step=step)
        written = jnp.where(done, -1, token)[..., None]
        out = jax.lax.dynamic_update_slice(out, written, (0, 0, step))
        return step + 1, State(
            token, out, done | jnp.isin(token, stop_ids), cache=cache, steering=steering
        )

    slots, first = state.cache.valid.shape[-1], state.cache.length
    end = jnp.minimum(max_new_tokens, step + slots - first)
    if state.steering is not None:
        end = jnp.minimum(end, state.steering.end)

    def unfinished(carry):
        return (carry[0] < end) & ~carry[1].done.all()

    _, state = jax.lax.while_loop(unfinished, write_token, (step, state))
    # Each device stops when its own rows are done, but the cache's length is one scalar for all
    # devices: it is set as if every device had decoded to the end.
    return state._replace(cache=state.cache._replace(length=first + end - step))


def _extend(model: Decoder, params, factors, tokens, positions, valid, cache):
    """Reads tokens that follow a prefix in the cache; see `extend_program`."""
    config = model.config
    if unrolls(config):
        factors = factors and unstack(factors, config.num_layers)
    variables = _variables(params, factors)
    hidden, cache = model.apply(variables, tokens, positions, None, cache, valid)
    return model.apply(variables, hidden[:, -1], method="unembed")[None], cache


class _Unrolled(NamedTuple):
    """A result of `decoding_params`, and weak references to the leaves it was made of."""

    origin: list[weakref.ref]
    mesh: Mesh | None
    params: dict


_newest: list[_Unrolled] = []  # at most one


def decoding_params(config: DecoderConfig, params: dict, mesh: Mesh | None) -> dict:
    """Returns the base parameters in the layout that decoding reads.

    Where generation unrolls the layers, this is a copy with the layers apart; elsewhere `params`
    itself. The newest copy is kept while its base lives: evaluations and Constitutional AI
    generate with the same base again and again.

    Args:
      config: shape of the decoder.
      params: base parameters with stacked layers.
      mesh: devices that the parameters lie on; None for one device.
    """
    if not unrolls(config):
        return params
    leaves = jax.tree.leaves(params)
    for newest in _newest:
        known = len(newest.origin) == len(leaves) and newest.mesh == mesh
        if known and all(ref() is leaf for ref, leaf in zip(newest.origin, leaves, strict=True)):
            return newest.params
    if is_shared(mesh):
        first = jax.tree.map(lambda x: x.addressable_data(0), params)
        unrolled = share(_unstacked(first, config.num_layers), mesh)
    else:
        unrolled = _unstacked(params, config.num_layers)
    origin = [weakref.ref(leaf, lambda _: _newest.clear()) for leaf in leaves]
    _newest[:] = [_Unrolled(origin, mesh, unrolled)]
    return unrolled


_unstacked = jax.jit(unstack, static_argnums=1)
_grown = jax.jit(grow_cache, static_argnums=1)


def grow(cache: KVCache, cache_len: int) -> KVCache:
    """Returns a cache of the same content with room for `cache_len` slots; the old one is freed.

    Args:
      cache: the old cache, which must not be read afterwards where it grows.
      cache_len: at least the slots of the old cache.
    """
    if cache.valid.shape[-1] == cache_len:
        return cache
    new = _grown(cache, cache_len)
    # Arrays of another size cannot be donated. Callers may still hold the old cache: deleted, its
    # memory is free as soon as it is copied.
    for old in jax.tree.leaves((cache.key, cache.value, cache.valid)):
        old.delete()
    return new


@functools.lru_cache
def prefill_program(
    model: Decoder, stacked: bool, mesh: Mesh | None, owned: bool = False
) -> Callable:
    """Returns the program that reads prompts into a new cache.

    Args:
      model: the decoder.
      stacked: whether the LoRA factors have a leading axis of adapters, each a group of answers.
      mesh: devices that split the rows; None for one device.

    Returns:
      `(params, factors, Packed) -> (logits [groups, rows, vocab], cache)`.
    """
    specs = Specs.of(model, stacked)
    return split_rows(
        functools.partial(_prefill, model, stacked),
        mesh,
        in_specs=(specs.whole, specs.factors(owned), specs.packed),
        out_specs=(specs.groups, specs.cache),
    )


@functools.lru_cache
def extend_program(model: Decoder, mesh: Mesh | None) -> Callable:
    """Returns the program that reads tokens behind a prefix cache, for one adapter.

    Args:
      model: the decoder.
      mesh: devices that split the rows; None for one device.

    Returns:
      `(params, factors, tokens [rows, seq], positions [rows, seq], valid [rows, seq], cache) ->
      (logits [1, rows, vocab], cache)`, with parameters from `decoding_params`; the cache is
      donated.
    """
    specs = Specs.of(model, stacked=False)
    return split_rows(
        functools.partial(_extend, model),
        mesh,
        in_specs=(specs.whole, specs.whole, specs.rows, specs.rows, specs.rows, specs.cache),
        out_specs=(specs.groups, specs.cache),
        donate=(5,),
    )


@functools.lru_cache
def decode_program(
    model: Decoder,
    sampling: Sampling,
    stacked: bool,
    mesh: Mesh | None,
    *,
    owned: bool = False,
    steered: bool = False,
) -> Callable:
    """Returns the program that decodes until the cache is full or all answers are done.

    Args:
      model: the decoder.
      sampling: how tokens are drawn.
      stacked: whether the LoRA factors have a leading axis of adapters, each a group of answers.
      mesh: devices that split the rows; None for one device.
      owned: whether the factors are an `Owned`, whose owner is int32 `[rows, 1]`.
      steered: whether the state has a `Steering`, whose end ends it too.

    Returns:
      `(params, factors, State, prompt_len [rows], step, keys [groups, rows], stop_ids) -> State`,
      with parameters from `decoding_params`; `step` tokens of each answer are written before. The
      state is donated.
    """
    specs = Specs.of(model, stacked)
    whole, state = specs.whole, specs.state
    if steered:
        state = state._replace(steering=Steering(specs.groups, specs.groups, end=whole))
    return split_rows(
        functools.partial(_decode, model, sampling, stacked),
        mesh,
        in_specs=(whole, specs.factors(owned), state, specs.rows, whole, specs.groups, whole),
        out_specs=state,
        donate=(2,),
    )
