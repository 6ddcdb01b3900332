"""Batched generation: prompts are read packed, then all rows of a batch decode together."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fedsafe_jax.inference import decoding
from fedsafe_jax.inference.prompt_packing import Packed, cache_length, pack_prompts
from fedsafe_jax.inference.sampling import GREEDY, Sampling
from fedsafe_jax.models.cache import KVCache
from fedsafe_jax.models.decoder import Decoder
from fedsafe_jax.models.decoder_config import ModelError
from fedsafe_jax.models.sharding import CLIENTS


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
    engine = Engine(
        model,
        params,
        adapter,
        stop_ids=stop_ids,
        batch_size=batch_size,
        mesh=mesh,
        num_adapters=num_adapters,
    )
    check_lengths(prompts, model.config.max_length - max_new_tokens)
    found = [empty_answers(len(prompts)) for _ in range(engine.groups)]
    for row_of, size in engine.batches(prompts):
        packed = pack_prompts(in_rows(prompts, row_of, size), engine.devices)
        logits, cache = engine.prefill(packed)
        lengths = packed.valid.sum(-1, dtype=np.int32)
        keys = engine.keys(seed, row_of, size)
        state = engine.answer(
            sampling, max_new_tokens, logits, cache, int(packed.width), lengths, keys
        )
        out, done = jax.device_get((state.out, state.done))
        for group, result in enumerate(found):
            collect(result, out[group], done[group], row_of, stop_ids)
    return found


def empty_answers(count: int) -> Generated:
    """To be filled by `collect`."""
    return Generated([[] for _ in range(count)], np.zeros(count, bool))


def in_rows(prompts, row_of: dict[int, int], size: int) -> list[Sequence[int]]:
    """The prompts by row; a row of nobody is empty."""
    rows: list[Sequence[int]] = [()] * size
    for i, row in row_of.items():
        rows[row] = prompts[i]
    return rows


def collect(result: Generated, out, done, row_of: dict[int, int], stop_ids) -> None:
    """Writes a batch's answers `out` int32 `[rows, max_new_tokens]` into `result`."""
    for i, row in row_of.items():
        ids = out[row][out[row] >= 0].tolist()
        result.ids[i] = ids[:-1] if ids and ids[-1] in stop_ids else ids
        result.finished[i] = done[row]


class Engine:
    """A model's programs, with what they read; arguments as for `generate_ids`."""

    def __init__(
        self, model, params, adapter, stop_ids, batch_size, mesh: Mesh | None = None, num_adapters=0
    ):
        self.model, self.mesh, self.batch_size, self.stop_ids = model, mesh, batch_size, stop_ids
        self.groups = max(num_adapters, 1)
        self.devices = mesh.shape.get(CLIENTS, 1) if mesh else 1
        self._stacked, self._params, self._adapter = bool(num_adapters), params, adapter
        self._decoding = decoding.decoding_params(model.config, params, mesh)
        self._stops = jnp.asarray(stop_ids, jnp.int32)

    def batches(self, prompts: Sequence[Sequence[int]]) -> list[tuple[dict[int, int], int]]:
        """Prompts of like length together: `(row of each prompt, rows)` of every batch."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        found = []
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            per_device = 1 << (-(-len(chosen) // self.devices) - 1).bit_length()
            per_device = min(per_device, -(-self.batch_size // self.devices))
            # Dealt out in turn, so that every device gets short and long ones.
            row_of = {
                i: n % self.devices * per_device + n // self.devices for n, i in enumerate(chosen)
            }
            found.append((row_of, per_device * self.devices))
        return found

    def keys(self, seed: int, row_of: dict[int, int], size: int):
        """A key for each adapter and row, that depends on the prompt's number, not on its row."""
        places = np.zeros(size, np.uint32)
        for i, row in row_of.items():
            places[row] = i
        return _row_keys(jax.random.key(seed), np.arange(self.groups, dtype=np.uint32), places)

    def prefill(self, packed: Packed):
        """Reads prompts: `(logits [groups, rows, vocab], cache)`."""
        program = decoding.prefill_program(self.model, self._stacked, self.mesh)
        return program(self._params, self._adapter, packed)

    def extend(self, tokens, positions, valid, cache: KVCache):
        """Reads what comes behind a cache, which is overwritten; for one adapter.

        Args:
          tokens, positions: int32 `[rows, seq]`, padded on the left.
          valid: bool `[rows, seq]`, False on padding.
          cache: with room for `seq` slots more.

        Returns:
          `(logits of the last tokens [1, rows, vocab], cache)`.
        """
        program = decoding.extend_program(self.model, self.mesh)
        return program(self._decoding, self._adapter, tokens, positions, valid, cache)

    def answer(
        self, sampling: Sampling, max_new_tokens: int, logits, cache, read: int, prompt_len, keys
    ) -> decoding.State:
        """Decodes from the logits of the prompts' last tokens.

        Args:
          sampling, max_new_tokens: see `generate_ids`.
          logits, cache: of the prompts; the cache is overwritten.
          read: slots of the cache that are written.
          prompt_len: int32 `[rows]`, tokens of each prompt, 0 for a row of nobody.
          keys: see `keys`.
        """
        decode = decoding.decode_program(self.model, sampling, self._stacked, self.mesh)
        first = decoding.start(sampling, max_new_tokens, logits, prompt_len, keys, self._stops)
        state, step = decoding.State(*first, cache), 1
        while step < max_new_tokens and not state.done.all():
            written = read + step - 1
            slots = cache_length(written + 1)
            if state.cache.valid.shape[-1] < slots:
                state = state._replace(cache=decoding.grow(state.cache, slots))
            slots = state.cache.valid.shape[-1]
            state = decode(
                self._decoding, self._adapter, state, prompt_len, step, keys, self._stops
            )
            step += slots - written
        return state


@jax.jit
def _row_keys(root, groups, places):
    """A key for each adapter and prompt, `[groups, rows]`."""
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    return jax.vmap(fold, (0, None))(fold(root, groups), places)
