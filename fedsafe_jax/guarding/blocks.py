"""The device's side of a search: candidates of all prompts of a batch, continued block by block."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fedsafe_jax.inference import decoding
from fedsafe_jax.inference.decoding_state import Specs, State, Steering, split_rows
from fedsafe_jax.inference.generation import Engine
from fedsafe_jax.inference.prompt_packing import cache_length, pack_prompts
from fedsafe_jax.inference.sampling import Sampling, choose
from fedsafe_jax.models.cache import KVCache
from fedsafe_jax.models.decoder import Decoder
from fedsafe_jax.models.sharding import fetch


class Answers(NamedTuple):
    """Answers so far, on the host: `kept` or `candidates` of them for each row of a batch.

    Attributes:
      out: int32 `[rows, answers, max_new_tokens]`, -1 where no token is written.
      done: bool `[rows, answers]`, whether the answer has a stop token.
      log_prob: float32 `[rows, answers]`, log-probability under the model, in nats.
    """

    out: np.ndarray
    done: np.ndarray
    log_prob: np.ndarray

    def take(self, chosen: np.ndarray) -> "Answers":
        """Returns the chosen answers of each row, int `[rows, count]`."""
        return jax.tree.map(
            lambda x: np.take_along_axis(
                x, chosen.reshape(*chosen.shape, *[1] * (x.ndim - 2)), axis=1
            ),
            self,
        )


class Blocks:
    """Continues the answers to a batch of prompts; the model reads each prompt once.

    All rows of a prompt lie on one device, so that answers are copied without any exchange.

    Args:
      engine: the compiled programs.
      prompts: token ids of every row, empty for a row that only fills up the batch.
      places: the place of each row's prompt among all prompts, which its samples depend on.
      candidates: answers that are continued for each row.
      max_new_tokens: longest answer.
      sampling: how tokens are drawn.
      seed: seed of the samples.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[Sequence[int]],
        places: Sequence[int],
        candidates: int,
        max_new_tokens: int,
        sampling: Sampling,
        seed: int,
    ):
        self._engine, self._sampling = engine, sampling
        self._count, self._room = candidates, max_new_tokens
        packed = pack_prompts(prompts, engine.devices, engine.platform)
        self._logits, self._kept = engine.prefill(packed)
        self._written = int(packed.width)
        self._prompt_len = packed.valid.sum(-1, dtype=np.int32).repeat(candidates)
        rows = len(prompts)
        row_of = {
            place * candidates + c: row * candidates + c
            for row, place in enumerate(places)
            if prompts[row]
            for c in range(candidates)
        }
        self._keys = engine.keys(seed, row_of, rows * candidates)
        self._grown: KVCache | None = None
        self._next: KVCache | None = None

    def first(self) -> Answers:
        """Returns the empty answer to each prompt, `[rows, 1]`; to no prompt it is done."""
        rows = len(self._prompt_len) // self._count
        empty = self._prompt_len[:: self._count] == 0
        out = np.full((rows, 1, self._room), -1, np.int32)
        return Answers(out, empty[:, None], np.zeros((rows, 1), np.float32))

    def grow(
        self,
        step: int,
        end: int,
        kept: Answers,
        active: np.ndarray,
        bias: np.ndarray | None = None,
        attempt: int = 0,
    ) -> Answers:
        """Continues the kept answers up to `end` tokens.

        Args:
          step: tokens that they have, those that are not done.
          end: tokens at which they stop.
          kept: the kept answers, `[rows, kept]`; each is continued equally often, in turn.
          active: bool `[rows]`; the answers of other rows are not continued.
          bias: float32 `[rows, vocab]`, added to the logits; None for nothing.
          attempt: how often this block was drawn before; changes the samples.

        Returns:
          `[rows, candidates]`.
        """
        count, rows = self._count, len(kept.done)
        parents = np.tile(np.arange(count) % kept.done.shape[1], (rows, 1))
        begun = kept.take(parents)
        out, done, log_prob = (x.reshape(1, rows * count, *x.shape[2:]) for x in begun)
        done = done | ~active.repeat(count)
        keys = _again(self._keys, attempt) if attempt else self._keys
        biases = jnp.zeros((1, rows * count, self._logits.shape[-1]), jnp.float32)
        if bias is not None:
            biases += jnp.repeat(jnp.asarray(bias), count, axis=0)
        token = out[..., step - 1]
        if step == 0:
            token, log_prob, ended = _first_token(
                self._sampling, self._logits, biases, done, keys, self._engine.stops
            )
            out = jnp.asarray(out).at[..., 0].set(jnp.where(done, -1, token))
            done, step = done | ended, 1
        slots = cache_length(self._written + end, self._engine.platform)
        cache = decoding.grow(self._take(self._kept, parents), slots)
        steering = Steering(biases, jnp.asarray(log_prob), jnp.int32(end))
        state = State(
            jnp.asarray(token), jnp.asarray(out), jnp.asarray(done), cache=cache, steering=steering
        )
        state = self._engine.steer(self._sampling, state, self._prompt_len, step, keys)
        self._grown = state.cache
        ahead = fetch((state.out, state.done, state.steering.log_prob))
        return Answers(*(x.reshape(rows, count, *x.shape[2:]) for x in ahead))

    def choose(self, chosen: np.ndarray, fresh: np.ndarray) -> None:
        """Chooses answers for the next block.

        Args:
          chosen: int `[rows, kept]`, among those that `grow` returned last.
          fresh: bool `[rows]`, the rows whose answers these are; others keep their last choice.
        """
        new, self._grown = self._take(self._grown, chosen), None
        if self._next is not None:
            new = _merged(self._next, new, fresh.repeat(chosen.shape[1]))
        self._next = new

    def advance(self) -> None:
        """Ends a block: `grow` goes on from what was chosen."""
        self._kept, self._next = self._next, None

    def _take(self, cache: KVCache, chosen: np.ndarray) -> KVCache:
        """Returns the cache of chosen answers, int `[rows, count]`, each within its own row."""
        rows, count = chosen.shape
        held = cache.valid.shape[0] // rows
        own = np.arange(rows) % (rows // self._engine.devices)  # rows are counted on each device
        flat = (own[:, None] * held + chosen).reshape(rows * count).astype(np.int32)
        return take_program(self._engine.model, self._engine.mesh)(cache, flat)


@functools.lru_cache
def take_program(model: Decoder, mesh: Mesh | None) -> Callable:
    """Returns the program that copies rows of a cache.

    Args:
      model: the decoder.
      mesh: devices that split the rows; None for one device.

    Returns:
      `(cache, rows int32 [count]) -> cache` of `count` rows; rows are counted on each device.
    """
    specs = Specs.of(model, stacked=False)
    return split_rows(_take, mesh, in_specs=(specs.cache, specs.rows), out_specs=specs.cache)


def _rows_axis(cache: KVCache) -> int:
    return 0 if isinstance(cache.key, tuple) else 1  # layers come first where they are stacked


def _take(cache: KVCache, rows: jax.Array) -> KVCache:
    axis = _rows_axis(cache)
    key, value = jax.tree.map(lambda x: jnp.take(x, rows, axis=axis), (cache.key, cache.value))
    return KVCache(key, value, cache.valid[rows], cache.length)


@jax.jit
def _merged(old: KVCache, new: KVCache, fresh: jax.Array) -> KVCache:
    """Takes the rows of `new` where `fresh` bool `[rows]`, those of `old` elsewhere."""
    axis = _rows_axis(new)

    def merge(a, b):
        return jnp.where(jnp.expand_dims(fresh, tuple(i for i in range(b.ndim) if i != axis)), b, a)

    key, value = jax.tree.map(merge, (old.key, old.value), (new.key, new.value))
    valid = jnp.where(fresh[:, None], new.valid, old.valid)
    return KVCache(key, value, valid, new.length)


@functools.partial(jax.jit, static_argnums=0)
def _first_token(sampling: Sampling, logits, biases, done, keys, stop_ids):
    """Chooses the first token of each candidate: `(token, its log-probability, whether it ends)`.

    Logits are `[1, rows, vocab]`; all else is `[1, rows * candidates, ...]`.
    """
    logits = jnp.repeat(logits, biases.shape[1] // logits.shape[1], axis=1)
    steered = (logits + biases).reshape(-1, logits.shape[-1])
    token = choose(steered, sampling, keys.reshape(-1), 0).reshape(keys.shape)
    return token, decoding.token_log_prob(logits, token, done), jnp.isin(token, stop_ids)


@jax.jit
def _again(keys, attempt):
    """Returns other keys for another attempt."""
    return jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))(keys, attempt)
