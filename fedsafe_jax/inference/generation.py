"""Batched generation: prompts are read packed, then all rows of a batch decode together."""

import collections
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fedsafe_jax import random_streams
from fedsafe_jax.inference import decoding
from fedsafe_jax.inference.decoding_state import State
from fedsafe_jax.inference.prompt_packing import (
    Packed,
    cache_length,
    owner_of_tokens,
    pack_prompts,
)
from fedsafe_jax.inference.sampling import GREEDY, Sampling
from fedsafe_jax.models.cache import KVCache
from fedsafe_jax.models.decoder import Decoder
from fedsafe_jax.models.decoder_config import ModelError
from fedsafe_jax.models.owned_lora import Owned
from fedsafe_jax.models.sharding import CLIENTS, fetch
from fedsafe_jax.random_streams import Purpose


class Generated(NamedTuple):
    """Answers to prompts, in the prompts' order.

    Attributes:
      ids: token ids of each answer, without the stop token.
      finished: bool `[prompts]`; False for an answer cut at `max_new_tokens`.
    """

    ids: list[list[int]]
    finished: np.ndarray


def check_lengths(prompts: Sequence[Sequence[int]], room: int) -> None:
    """Raises `ModelError` when a prompt has more than `room` tokens.

    Args:
      prompts: token ids of each prompt.
      room: tokens of the model's context less those of the answer.
    """
    for i, prompt in enumerate(prompts):
        if len(prompt) > room:
            raise ModelError(
                f"prompt {i} has {len(prompt)} tokens, and the model's context leaves room for "
                f"{room} before the answer; shorten it or lower max_new_tokens."
            )


def generate_ids(
    model: Decoder,
    params: dict,
    factors: dict | None,
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
      factors: LoRA factors, or None for the base model.
      prompts: token ids of each prompt.
      stop_ids: tokens that end an answer.
      max_new_tokens: longest answer.
      seed: seed of the samples; greedy generation ignores it.
      sampling: how tokens are drawn.
      batch_size: rows decoded at once, for each adapter.
      mesh: devices; the axis `clients` splits the rows. None for one device.
      num_adapters: 0 for one adapter; else the size of the leading axis of all `factors`. Each of
        these adapters answers all prompts, in the same batches.

    Returns:
      The answers under each adapter; a list of one for one adapter.

    Raises:
      ModelError: a prompt is too long for the model's context.
    """
    engine = Engine(
        model,
        params,
        factors,
        stop_ids=stop_ids,
        batch_size=batch_size,
        mesh=mesh,
        num_adapters=num_adapters,
    )
    check_lengths(prompts, model.config.max_length - max_new_tokens)
    answers = [empty_answers(len(prompts)) for _ in range(engine.groups)]
    for row_of, size in engine.batches(prompts):
        packed = pack_prompts(in_rows(prompts, row_of, size), engine.devices, engine.platform)
        logits, cache = engine.prefill(packed)
        pieces = engine.pieces(
            sampling,
            max_new_tokens,
            logits=logits,
            cache=cache,
            written=int(packed.width),
            prompt_len=packed.valid.sum(-1, dtype=np.int32),
            keys=engine.keys(seed, row_of, size),
        )
        state = last(pieces)
        out, done = fetch((state.out, state.done))
        for group, generated in enumerate(answers):
            collect(generated, out[group], done[group], row_of=row_of, stop_ids=stop_ids)
    return answers


def empty_answers(count: int) -> Generated:
    """Returns a `Generated` for `count` prompts, which `collect` fills."""
    return Generated([[] for _ in range(count)], np.zeros(count, bool))


def in_rows(
    prompts: Sequence[Sequence[int]], row_of: dict[int, int], size: int
) -> list[Sequence[int]]:
    """Places prompts in the `size` rows of a batch; unused rows are empty.

    Args:
      prompts: token ids of all prompts.
      row_of: the row of each prompt of the batch, by its place in `prompts`.
      size: rows of the batch.
    """
    rows: list[Sequence[int]] = [()] * size
    for i, row in row_of.items():
        rows[row] = prompts[i]
    return rows


def collect(
    generated: Generated,
    out: np.ndarray,
    done: np.ndarray,
    row_of: dict[int, int],
    stop_ids: Collection[int],
) -> None:
    """Writes the answers of one batch into the answers to all prompts.

    Args:
      generated: answers to all prompts; changed in place.
      out: int32 `[rows, max_new_tokens]`, -1 where no token was written.
      done: bool `[rows]`, whether the answer has a stop token.
      row_of: the row of each prompt of the batch.
      stop_ids: tokens that end an answer.
    """
    for i, row in row_of.items():
        ids = out[row][out[row] >= 0].tolist()
        generated.ids[i] = ids[:-1] if ids and ids[-1] in stop_ids else ids
        generated.finished[i] = done[row]


class Engine:
    """The compiled programs of a model together with the parameters they read.

    Args:
      model, params, factors, stop_ids, batch_size, mesh, num_adapters: see `generate_ids`.
    """

    def __init__(
        self,
        model: Decoder,
        params: dict,
        factors: dict | None,
        stop_ids: Sequence[int],
        batch_size: int,
        mesh: Mesh | None = None,
        num_adapters: int = 0,
    ):
        self.model, self.mesh, self.batch_size, self.stop_ids = model, mesh, batch_size, stop_ids
        self.groups = max(num_adapters, 1)
        self.devices = mesh.shape.get(CLIENTS, 1) if mesh else 1
        self.platform = model.config.platform
        self._stacked, self._params, self._factors = bool(num_adapters), params, factors
        self._decoding_params = decoding.decoding_params(model.config, params, mesh)
        self.stops = jnp.asarray(stop_ids, jnp.int32)

    def batches(
        self, prompts: Sequence[Sequence[int]], rows_for: Callable[[int], int] | None = None
    ) -> list[tuple[dict[int, int], int]]:
        """Sorts prompts of similar length into batches.

        Args:
          prompts: token ids of each prompt.
          rows_for: `prompts of a device -> its rows`; None for the next power of two, so that few
            numbers of rows are compiled.

        Returns:
          `(row of each prompt, number of rows)` of every batch.
        """
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        batches = []
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            per_device = (rows_for or _power_of_two)(-(-len(chosen) // self.devices))
            per_device = min(per_device, -(-self.batch_size // self.devices))
            # Dealt out in turn, so that every device gets short and long prompts.
            row_of = {
                i: n % self.devices * per_device + n // self.devices for n, i in enumerate(chosen)
            }
            batches.append((row_of, per_device * self.devices))
        return batches

    def keys(self, seed: int, row_of: dict[int, int], size: int) -> jax.Array:
        """Returns PRNG keys `[groups, size]`, one for each adapter and row.

        A key depends on the prompt's place among all prompts, not on its row, so that samples do
        not depend on the batch.
        """
        places = np.zeros(size, np.uint32)
        for i, row in row_of.items():
            places[row] = i
        root = random_streams.key(Purpose.SAMPLES, seed)
        return _row_keys(root, np.arange(self.groups, dtype=np.uint32), places)

    def prefill(
        self, packed: Packed, owners: np.ndarray | None = None
    ) -> tuple[jax.Array, KVCache]:
        """Reads prompts into a new cache: `(logits [groups, rows, vocab], cache)`.

        Args:
          packed: the prompts.
          owners: int32 `[rows]`, the adapter of each row, where the factors are of
            `adapter_stack.stack`; None elsewhere.
        """
        factors, owned = self._factors, owners is not None
        if owned:
            factors = Owned(factors, owner_of_tokens(packed, owners, self.devices))
        program = decoding.prefill_program(self.model, self._stacked, self.mesh, owned=owned)
        return program(self._params, factors, packed)

    def extend(
        self, tokens: np.ndarray, positions: np.ndarray, valid: np.ndarray, cache: KVCache
    ) -> tuple[jax.Array, KVCache]:
        """Reads tokens behind a prefix cache, for one adapter.

        Args:
          tokens, positions: int32 `[rows, seq]`, padded on the left.
          valid: bool `[rows, seq]`, False on padding.
          cache: a cache with `seq` free slots; its memory is overwritten.

        Returns:
          `(logits of the last tokens [1, rows, vocab], cache)`.
        """
        program = decoding.extend_program(self.model, self.mesh)
        return program(self._decoding_params, self._factors, tokens, positions, valid, cache)

    def pieces(
        self,
        sampling: Sampling,
        max_new_tokens: int,
        logits: jax.Array,
        cache: KVCache,
        written: int,
        prompt_len: np.ndarray,
        keys: jax.Array,
        owners: np.ndarray | None = None,
    ) -> Iterator[State]:
        """Decodes answers, and yields them with their first token and whenever the cache is full.

        Args:
          sampling: how tokens are drawn.
          max_new_tokens: longest answer.
          logits: `[groups, rows, vocab]` of the prompts' last tokens.
          cache: keys and values of the prompts; its memory is overwritten.
          written: slots of the cache that the prompts fill.
          prompt_len: int32 `[rows]`, tokens of each prompt, 0 for an unused row.
          keys: PRNG keys `[groups, rows]` of `keys`.
          owners: as in `prefill`.

        Yields:
          The answers so far; the memory of a state is overwritten by the next one.
        """
        factors, owned = self._factors, owners is not None
        factors = Owned(factors, owners[:, None]) if owned else factors
        decode = decoding.decode_program(
            self.model, sampling, self._stacked, mesh=self.mesh, owned=owned
        )
        token, out, done = decoding.start(
            sampling, max_new_tokens, logits, prompt_len, keys, self.stops
        )
        state, step = State(token, out, done, cache=cache), 1
        yield state
        while step < max_new_tokens and not state.done.all():
            used = written + step - 1
            slots = cache_length(used + 1, self.platform)
            if state.cache.valid.shape[-1] < slots:
                state = state._replace(cache=decoding.grow(state.cache, slots))
            slots = state.cache.valid.shape[-1]
            state = decode(
                self._decoding_params,
                factors,
                state,
                prompt_len,
                step,
                keys,
                self.stops,
            )
            step += slots - used
            yield state

    def steer(
        self, sampling: Sampling, state: State, prompt_len: np.ndarray, step: int, keys: jax.Array
    ) -> State:
        """Decodes answers of a search, for one adapter, up to the end that their steering names.

        Args:
          sampling: how tokens are drawn.
          state: the answers, with a `Steering`; its cache has the room. Its memory is overwritten.
          prompt_len: int32 `[rows]`, tokens of each prompt.
          step: tokens that each answer has.
          keys: PRNG keys `[1, rows]`.
        """
        decode = decoding.decode_program(self.model, sampling, False, mesh=self.mesh, steered=True)
        return decode(
            self._decoding_params, self._factors, state, prompt_len, step, keys, self.stops
        )


def last(pieces: Iterator[State]) -> State:
    """Decodes to the end: returns the last of the states that `Engine.pieces` yields."""
    return collections.deque(pieces, maxlen=1).pop()


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


@jax.jit
def _row_keys(root, groups, places):
    """Derives a key for each adapter and prompt, `[groups, rows]`."""
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    return jax.vmap(fold, (0, None))(fold(root, groups), places)
