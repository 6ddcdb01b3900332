"""The programs of generation: packed prefill, reading behind a cache, and `lax.while_loop`s over a
KV cache that grows.

Decoding is compiled for the length of the cache alone, whatever the prompts' lengths.
"""

import functools
import weakref
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

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
from fedsafe_jax.models.sharding import CLIENTS, is_shared, share

SHARED = KVCache(0, 0, 0, None)  # vmap axes over adapters: the length is one for all


def _variables(params, adapter):
    return {"params": params} | ({"lora": adapter} if adapter is not None else {})


def _prefill(model: Decoder, stacked: bool, params, adapter, packed: Packed):
    """Reads the prompts, packed; see `prefill_program`."""

    def read(adapter):
        rows, seq = packed.tokens.shape
        cache, inside = empty_cache(model.config, rows, seq), packed.segment_ids > 0
        hidden, cache = model.apply(
            _variables(params, adapter), packed.tokens, packed.positions, packed.segment_ids,
            cache, inside,
        )  # fmt: skip
        last = hidden.reshape(-1, hidden.shape[-1])[packed.last]
        logits = model.apply(_variables(params, None), last, method="unembed")
        return logits, spread_cache(model.config, cache, packed.source, packed.valid, packed.width)

    if stacked:
        # Only adapters are mapped: the base's products stay one product.
        return jax.vmap(read, out_axes=(0, SHARED))(adapter)
    logits, cache = read(adapter)
    return logits[None], cache


class State(NamedTuple):
    """Answers under way, of `groups` adapters.

    Attributes:
      token: int32 `[groups, rows]`, the last of each answer, not yet read.
      out: int32 `[groups, rows, max_new_tokens]`, -1 where nothing was written.
      done: bool `[groups, rows]`, the answer has a stop token.
      cache: of prompts and answers so far.
    """

    token: jax.Array
    out: jax.Array
    done: jax.Array
    cache: KVCache


def _pick(sampling: Sampling, logits, keys, step):
    """The token at `step` for logits `[groups, rows, vocab]`, int32 `[groups, rows]`."""
    flat = logits.reshape(-1, logits.shape[-1])
    return choose(flat, sampling, keys.reshape(-1), step).reshape(keys.shape)


@functools.partial(jax.jit, static_argnums=(0, 1))
def start(sampling: Sampling, max_new_tokens: int, logits, prompt_len, keys, stop_ids):
    """`token, out, done` of `State` after the first token."""
    token = _pick(sampling, logits, keys, 0)
    # Rows without a prompt only fill up the batch.
    empty = jnp.broadcast_to(prompt_len == 0, token.shape)
    out = jnp.full((*token.shape, max_new_tokens), -1, jnp.int32)
    out = out.at[..., 0].set(jnp.where(empty, -1, token))
    return token, out, empty | jnp.isin(token, stop_ids)


def _decode(
    model: Decoder, sampling: Sampling, stacked: bool,
    params, adapter, state: State, prompt_len, step, keys, stop_ids,
):  # fmt: skip
    """Continues until the cache is full, with parameters from `decoding_params`; see
    `decode_program`."""
    config, (_, rows, max_new_tokens) = model.config, state.out.shape
    if unrolls(config):
        adapter = adapter and unstack(adapter, config.num_layers, axis=int(stacked))
    new = jnp.ones((rows, 1), bool)

    def read(adapter, tokens, positions, cache):
        variables = _variables(params, adapter)
        hidden, cache = model.apply(variables, tokens[:, None], positions, None, cache, new)
        return model.apply(variables, hidden[:, -1], method="unembed"), cache

    def step_logits(tokens, positions, cache):
        if stacked:
            mapped = jax.vmap(read, (0, 0, None, SHARED), (0, SHARED))
            return mapped(adapter, tokens, positions, cache)
        logits, cache = read(adapter, tokens[0], positions, cache)
        return logits[None], cache

    def extend(carry):
        step, (token, out, done, cache) = carry
        logits, cache = step_logits(token, (prompt_len + step - 1)[:, None], cache)
        token = _pick(sampling, logits, keys, step)
        written = jnp.where(done, -1, token)[..., None]
        out = jax.lax.dynamic_update_slice(out, written, (0, 0, step))
        return step + 1, State(token, out, done | jnp.isin(token, stop_ids), cache)

    slots, first = state.cache.valid.shape[-1], state.cache.length
    end = jnp.minimum(max_new_tokens, step + slots - first)

    def unfinished(carry):
        return (carry[0] < end) & ~carry[1].done.all()

    _, state = jax.lax.while_loop(unfinished, extend, (step, state))
    # The same on every device, also on one whose rows were all done before.
    return state._replace(cache=state.cache._replace(length=first + end - step))


def _extend(model: Decoder, params, adapter, tokens, positions, valid, cache):
    """Reads what comes behind a cache; see `read_on_program`."""
    config = model.config
    if unrolls(config):
        adapter = adapter and unstack(adapter, config.num_layers)
    variables = _variables(params, adapter)
    hidden, cache = model.apply(variables, tokens, positions, None, cache, valid)
    return model.apply(variables, hidden[:, -1], method="unembed")[None], cache


class _Kept(NamedTuple):
    """The latest of `decoding_params`, and weak references to what it was made of."""

    origin: list[weakref.ref]
    mesh: Mesh | None
    params: dict


_kept: list[_Kept] = []  # at most one


def decoding_params(config: DecoderConfig, params, mesh: Mesh | None):
    """The base as `_decode` reads it: where layers are unrolled, one by one.

    The copy is kept while the base lives and no other is generated with: evaluations and CAI ask
    for the same one again and again.
    """
    if not unrolls(config):
        return params
    leaves = jax.tree.leaves(params)
    for kept in _kept:
        known = len(kept.origin) == len(leaves) and kept.mesh == mesh
        if known and all(ref() is leaf for ref, leaf in zip(kept.origin, leaves, strict=True)):
            return kept.params
    if is_shared(mesh):
        first = jax.tree.map(lambda x: x.addressable_data(0), params)
        made = share(_unstacked(first, config.num_layers), mesh)
    else:
        made = _unstacked(params, config.num_layers)
    origin = [weakref.ref(leaf, lambda _: _kept.clear()) for leaf in leaves]
    _kept[:] = [_Kept(origin, mesh, made)]
    return made


_unstacked = jax.jit(unstack, static_argnums=1)
grow = jax.jit(grow_cache, static_argnums=1)


def _split(function, model: Decoder, stacked: bool, mesh, inputs: str, outputs: str, donate=()):
    """Jits a program, with rows split over the mesh axis `clients`; each device stops with its own.

    Args:
      function: to jit.
      model, stacked: of the program.
      mesh: or None.
      inputs, outputs: a letter an argument or result: `w`hole, `r`ows first, `g`roups then rows,
        `p`acked prompts, `c`ache, `s`tate.
      donate: numbers of arguments to overwrite.
    """
    if mesh is None or mesh.shape.get(CLIENTS, 1) == 1:
        return jax.jit(function, donate_argnums=donate)
    lead = (None,) * stacked
    layer = PartitionSpec(*lead, *(() if unrolls(model.config) else (None,)), CLIENTS)
    row, group = PartitionSpec(CLIENTS), PartitionSpec(None, CLIENTS)
    cache = KVCache(layer, layer, PartitionSpec(*lead, CLIENTS), PartitionSpec())
    spec = {
        "w": PartitionSpec(),
        "r": row,
        "p": Packed(row, row, row, source=row, valid=row, last=row, width=PartitionSpec()),
        "g": group,
        "c": cache,
        "s": State(group, group, group, cache),
    }
    in_specs, out_specs = (tuple(spec[letter] for letter in x) for x in (inputs, outputs))
    if len(out_specs) == 1:
        (out_specs,) = out_specs
    # Nothing is differentiated, so there is nothing for check_vma to check.
    mapped = jax.shard_map(
        function,
        mesh=mesh,
        axis_names={CLIENTS},
        check_vma=False,
        in_specs=in_specs,
        out_specs=out_specs,
    )
    return jax.jit(mapped, donate_argnums=donate)


@functools.lru_cache
def prefill_program(model: Decoder, stacked: bool, mesh: Mesh | None):
    """`(params, adapter, Packed) -> (logits [groups, rows, vocab], cache)`, a group an adapter."""
    prefill = functools.partial(_prefill, model, stacked)
    return _split(prefill, model, stacked, mesh=mesh, inputs="wwp", outputs="gc")


@functools.lru_cache
def extend_program(model: Decoder, mesh: Mesh | None):
    """`(params, adapter, tokens [rows, seq], positions, valid, cache) -> (logits [1, rows, vocab],
    cache)`, with parameters from `decoding_params`; the cache is overwritten."""
    return _split(
        functools.partial(_extend, model),
        model,
        False,
        mesh=mesh,
        inputs="wwrrrc",
        outputs="gc",
        donate=(5,),
    )


@functools.lru_cache
def decode_program(model: Decoder, sampling: Sampling, stacked: bool, mesh: Mesh | None):
    """`(params, adapter, State, prompt_len [rows], step, keys [groups, rows], stop_ids) -> State`,
    where `step` tokens are written already."""
    decode = functools.partial(_decode, model, sampling, stacked)
    return _split(decode, model, stacked, mesh=mesh, inputs="wwsrwgw", outputs="s", donate=(2,))
