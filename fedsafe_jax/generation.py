"""Batched generation: packed prefill, then `lax.while_loop`s over a KV cache that grows."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from fedsafe_jax.data import packing
from fedsafe_jax.models.cache import (
    KVCache,
    empty_cache,
    grow_cache,
    spread_cache,
    unrolls,
    unstack,
)
from fedsafe_jax.models.decoder import Decoder
from fedsafe_jax.models.decoder_config import DecoderConfig, ModelError
from fedsafe_jax.models.sharding import CLIENTS, is_shared, share

PACKED_TOKENS = 128  # short prompts are read in rows of this
FIRST_TOKENS = 32  # answers start with room for so many; the cache then doubles what it has


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


class Packed(NamedTuple):
    """Prompts packed into dense rows, so that reading them costs nothing for padding.

    Attributes:
      tokens, positions, segment_ids: int32 `[packed_rows, seq]`, as in `data.packing`.
      source: int32 `[rows, width]`: where in its device's packed rows (flat) a left-padded prompt's
        tokens lie; 0 on padding.
      valid: bool `[rows, width]`, False on padding.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    source: np.ndarray
    valid: np.ndarray


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


def cache_lengths(width: int, max_new_tokens: int) -> list[int]:
    """Lengths that the cache takes, in turn: what is added doubles, so that attention never reads
    much more than what is written, with few compiled loops."""
    lengths, room = [], min(FIRST_TOKENS, max_new_tokens)
    while True:
        lengths.append(width + min(room, max_new_tokens))
        if room >= max_new_tokens:
            return lengths
        room *= 2


SHARED = KVCache(0, 0, 0, None)  # vmap axes over adapters: the length is one for all


def _variables(params, adapter):
    return {"params": params} | ({"lora": adapter} if adapter is not None else {})


def _prefill(model: Decoder, stacked: bool, params, adapter, packed: Packed):
    """Reads the prompts, packed; see `_prefill_program`."""

    def read(adapter):
        rows, seq = packed.tokens.shape
        cache, inside = empty_cache(model.config, rows, seq), packed.segment_ids > 0
        hidden, cache = model.apply(
            _variables(params, adapter), packed.tokens, packed.positions, packed.segment_ids,
            cache, inside,
        )  # fmt: skip
        last = hidden.reshape(-1, hidden.shape[-1])[packed.source[:, -1]]
        logits = model.apply(_variables(params, None), last, method="unembed")
        return logits, spread_cache(model.config, cache, packed.source, packed.valid)

    if stacked:
        # Only adapters are mapped: the base's products stay one product.
        return jax.vmap(read, out_axes=(0, SHARED))(adapter)
    logits, cache = read(adapter)
    return logits[None], cache


def _decode(
    model: Decoder, sampling: Sampling, max_new_tokens: int, stacked: bool,
    params, adapter, logits, cache: KVCache, valid, keys, stop_ids,
):  # fmt: skip
    """Continues, with parameters from `_decoding_params`; see `_decode_program`."""
    (groups, rows), width, config = keys.shape, valid.shape[1], model.config
    if unrolls(config):
        adapter = adapter and unstack(adapter, config.num_layers, axis=int(stacked))
    length = valid.sum(-1)  # of each prompt
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

    def pick(logits, step):
        flat = logits.reshape(-1, logits.shape[-1])
        return choose(flat, sampling, keys.reshape(-1), step).reshape(groups, rows)

    def extend(state):
        step, token, out, done, cache = state
        written = jnp.where(done, -1, token)[..., None]
        out = jax.lax.dynamic_update_slice(out, written, (0, 0, step))
        done = done | jnp.isin(token, stop_ids)
        logits, cache = step_logits(token, (length + step)[:, None], cache)
        return step + 1, pick(logits, step + 1), out, done, cache

    out = jnp.full((groups, rows, max_new_tokens), -1, jnp.int32)
    done = jnp.broadcast_to(length == 0, (groups, rows))  # rows that only fill up the batch
    state = (jnp.zeros((), jnp.int32), pick(logits, 0), out, done, cache)
    for cache_len in cache_lengths(width, max_new_tokens):

        def unfinished(state, end=cache_len - width):
            return (state[0] < end) & ~state[3].all()

        state = (*state[:-1], grow_cache(state[-1], cache_len))
        state = jax.lax.while_loop(unfinished, extend, state)
    return state[2], state[3]


def _decoding_params(config: DecoderConfig, params, mesh: Mesh | None):
    """The base as `_decode` reads it: where layers are unrolled, one by one."""
    if not unrolls(config):
        return params
    if not is_shared(mesh):
        return _unstacked(params, config.num_layers)
    first = jax.tree.map(lambda x: x.addressable_data(0), params)
    return share(_unstacked(first, config.num_layers), mesh)


_unstacked = jax.jit(unstack, static_argnums=1)


def _split(function, model: Decoder, stacked: bool, mesh, inputs: str, outputs: str):
    """Jits a program, with rows split over the mesh axis `clients`; each device stops with its own.

    Args:
      function: to jit.
      model, stacked: of the program.
      mesh: or None.
      inputs, outputs: a letter an argument or result: `w`hole, `r`ows first, `g`roups then rows,
        `c`ache.
    """
    if mesh is None or mesh.shape.get(CLIENTS, 1) == 1:
        return jax.jit(function)
    lead = (None,) * stacked
    layer = PartitionSpec(*lead, *(() if unrolls(model.config) else (None,)), CLIENTS)
    spec = {
        "w": PartitionSpec(),
        "r": PartitionSpec(CLIENTS),
        "g": PartitionSpec(None, CLIENTS),
        "c": KVCache(layer, layer, PartitionSpec(*lead, CLIENTS), PartitionSpec()),
    }
    in_specs, out_specs = (tuple(spec[letter] for letter in x) for x in (inputs, outputs))
    # Nothing is differentiated, so there is nothing for check_vma to check.
    mapped = jax.shard_map(
        function,
        mesh=mesh,
        axis_names={CLIENTS},
        check_vma=False,
        in_specs=in_specs,
        out_specs=out_specs,
    )
    return jax.jit(mapped)


@functools.lru_cache
def _prefill_program(model: Decoder, stacked: bool, mesh: Mesh | None):
    """`(params, adapter, Packed) -> (logits [groups, rows, vocab], cache)`, a group an adapter."""
    prefill = functools.partial(_prefill, model, stacked)
    return _split(prefill, model, stacked, mesh, "wwr", "gc")


@functools.lru_cache
def _decode_program(
    model: Decoder, sampling: Sampling, max_new_tokens: int, stacked: bool, mesh: Mesh | None
):
    """`(params, adapter, logits, cache, valid [rows, width], keys [groups, rows], stop_ids) ->
    (out int32 [groups, rows, max_new_tokens], done bool [groups, rows])`."""
    decode = functools.partial(_decode, model, sampling, max_new_tokens, stacked)
    return _split(decode, model, stacked, mesh, "wwgcrgw", "gg")


def pack_prompts(prompts: Sequence[Sequence[int]], devices: int = 1) -> Packed:
    """Packs prompts for prefill, those of each device into rows of its own.

    Args:
      prompts: token ids of every row; an empty one only fills up the batch.
      devices: that the rows are split over evenly.
    """
    lengths = [len(p) for p in prompts]
    width = _round_up(max(lengths))
    count = len(prompts) // devices
    totals = [sum(lengths[d * count : (d + 1) * count]) for d in range(devices)]
    seq = max(width, min(PACKED_TOKENS, _round_up(max(totals))))
    plans = []
    for d in range(devices):
        mine = [i for i in range(d * count, (d + 1) * count) if lengths[i]]
        rows = packing.assign_rows([lengths[i] for i in mine], seq)
        plans.append([[mine[i] for i in row] for row in rows])
    size = packing.bucket(max(len(plan) for plan in plans))
    tokens, positions, segments = (np.zeros((devices * size, seq), np.int32) for _ in range(3))
    source = np.zeros((len(prompts), width), np.int32)
    valid = np.zeros((len(prompts), width), bool)
    for d, plan in enumerate(plans):
        for r, members in enumerate(plan):
            start = 0
            for segment, i in enumerate(members, 1):
                part = slice(start, start + lengths[i])
                tokens[d * size + r, part] = prompts[i]
                positions[d * size + r, part] = np.arange(lengths[i])
                segments[d * size + r, part] = segment
                source[i, width - lengths[i] :] = r * seq + np.arange(start, part.stop)
                valid[i, width - lengths[i] :] = True
                start = part.stop
    return Packed(tokens, positions, segments, source, valid)


def _round_up(tokens: int) -> int:
    """To a multiple of 16, or of a greater power of two for long prompts: few shapes."""
    multiple = max(16, (1 << tokens.bit_length()) // 8)
    return -(-max(tokens, 1) // multiple) * multiple


class Generated(NamedTuple):
    """Answers to prompts, in the order given."""

    ids: list[list[int]]  # without the stop token
    finished: np.ndarray  # bool [n]; False: cut at max_new_tokens


def check_lengths(prompts: Sequence[Sequence[int]], room: int) -> None:
    """Raises `ModelError` when a prompt leaves no room for its answer in the context."""
    for i, prompt in enumerate(prompts):
        if len(prompt) > room:
            raise ModelError(
                f"prompt {i} has {len(prompt)} tokens, and the model's context leaves room for "
                f"{room} before the answer; shorten it or lower max_new_tokens."
            )


def generate_ids(
    model: Decoder,
    params,
    adapter,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    max_new_tokens: int,
    seed: int = 0,
    sampling: Sampling = GREEDY,
    batch_size: int = 64,
    mesh: Mesh | None = None,
    num_adapters: int = 0,
) -> list[Generated]:
    """Continues tokenised prompts.

    Prompts are sorted by length into batches, so that each batch is padded to its own bucket. A
    sampled answer depends on the seed, the adapter and the prompt's place in the list, not on the
    batch it falls into.

    Args:
      model: the decoder.
      params: base parameters.
      adapter: LoRA factors, or None for the base model.
      prompts: token ids of each prompt.
      stop_ids: tokens that end an answer.
      max_new_tokens: longest answer.
      seed: of the samples; greedy generation ignores it.
      sampling: how tokens are drawn.
      batch_size: rows decoded at once, for each adapter.
      mesh: its axis `clients` splits the rows; None for one device.
      num_adapters: 0 for one adapter; else every leaf of `adapter` has a leading axis of that size,
        and each adapter answers all prompts, in the same batches.

    Returns:
      What each adapter generated; a list of one for one adapter.

    Raises:
      ModelError: a prompt is too long for the model's context.
    """
    check_lengths(prompts, model.config.max_length - max_new_tokens)
    groups, devices = max(num_adapters, 1), mesh.shape.get(CLIENTS, 1) if mesh else 1
    prefill = _prefill_program(model, bool(num_adapters), mesh)
    decode = _decode_program(model, sampling, max_new_tokens, bool(num_adapters), mesh)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found = [Generated([[] for _ in prompts], np.zeros(len(prompts), bool)) for _ in range(groups)]
    decoding = _decoding_params(model.config, params, mesh)
    root, stops = jax.random.key(seed), jnp.asarray(stop_ids, jnp.int32)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        per_device = 1 << (-(-len(chosen) // devices) - 1).bit_length()
        per_device = min(per_device, -(-batch_size // devices))
        # Dealt out in turn, so that every device gets short and long ones.
        row_of = {i: n % devices * per_device + n // devices for n, i in enumerate(chosen)}
        dealt: list[Sequence[int]] = [()] * (per_device * devices)
        places = np.zeros(len(dealt), np.uint32)
        for i, row in row_of.items():
            dealt[row], places[row] = prompts[i], i
        packed = pack_prompts(dealt, devices)
        keys = _row_keys(root, np.arange(groups, dtype=np.uint32), places)
        logits, cache = prefill(params, adapter, packed)
        out = decode(decoding, adapter, logits, cache, packed.valid, keys, stops)
        out, done = jax.device_get(out)
        for group, result in enumerate(found):
            for i, row in row_of.items():
                ids = out[group, row][out[group, row] >= 0].tolist()
                result.ids[i] = ids[:-1] if ids and ids[-1] in stop_ids else ids
                result.finished[i] = done[group, row]
    return found


@jax.jit
def _row_keys(root, groups, places):
    """A key for each adapter and prompt, `[groups, rows]`."""
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    return jax.vmap(fold, (0, None))(fold(root, groups), places)
