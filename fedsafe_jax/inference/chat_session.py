"""Dialogues that grow turn by turn, answered with a prefix cache."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fedsafe_jax.data import packing
from fedsafe_jax.inference import decoding, generation
from fedsafe_jax.inference.language_model import Dialogue, LanguageModel
from fedsafe_jax.inference.prompt_packing import cache_length, pack_prompts
from fedsafe_jax.inference.sampling import Sampling
from fedsafe_jax.models.cache import KVCache
from fedsafe_jax.models.decoder_config import ModelError
from fedsafe_jax.models.sharding import fetch

CACHE_BYTES = 4 << 30  # most bytes of all caches kept between two calls


@dataclasses.dataclass
class _CachedBatch:
    """Dialogues that are answered together, with their prefix cache.

    Attributes:
      row_of: the row of each dialogue.
      size: number of rows.
      tokens: token ids of each row that the cache holds.
      slots: the cache's slot of each of these tokens, by row.
      cache: None before the first turn, and where the cache was not kept.
    """

    row_of: dict[int, int]
    size: int
    tokens: list[list[int]]
    slots: list[np.ndarray]
    cache: KVCache | None = None


class ChatSession:
    """Answers the same growing dialogues call after call, with a prefix cache.

    The keys and values of each dialogue stay in a KV cache between calls, so that a call reads
    only the tokens after the longest common prefix with the previous call: a critique and a
    revision do not pay again for the request and the first answer. The answers equal those of
    `LanguageModel.answer_dialogues` up to the order of floating-point sums.

    Models with windowed attention layers keep no cache. A window is measured in slots of the
    cache, and in an extended cache a token's slot is not its position in the text.

    Args:
      lm: the model, under its adapter.
      batch_size: dialogues answered at once.

    Raises:
      ModelError: the model is under guards.
    """

    def __init__(self, lm: LanguageModel, batch_size: int = 64):
        if lm.is_guarded:
            raise ModelError(
                "a chat session decodes the model itself, past its guards; ask "
                "answer_dialogues of the guarded model."
            )
        self._lm = lm
        self._engine = generation.Engine(
            lm.model,
            lm.params,
            lm.factors,
            stop_ids=lm.stop_ids,
            batch_size=batch_size,
            mesh=lm.mesh,
        )
        self._batches: list[_CachedBatch] = []

    def answer_dialogues(
        self,
        dialogues: Sequence[Dialogue],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        truncate: bool = False,
    ) -> tuple[list[str], np.ndarray]:
        """Answers dialogues like `LanguageModel.answer_dialogues`.

        Args:
          dialogues: each at the same place in every call; where a dialogue differs from the
            previous call's, it is read again from there.
          max_new_tokens: longest answer.
          temperature, top_k, top_p, min_p: see `sampling.Sampling`.
          seed: seed of the samples.
          truncate: see `LanguageModel.answer_dialogues`.

        Returns:
          `(texts, finished bool [dialogues])`.

        Raises:
          ModelError: a dialogue is too long for the context.
        """
        prompts = self._lm.render(dialogues, max_new_tokens, truncate)
        generation.check_lengths(prompts, self._lm.config.max_length - max_new_tokens)
        if sum(len(b.row_of) for b in self._batches) != len(prompts):
            self._batches = [
                _CachedBatch(row_of, size, [[]] * size, slots=[np.zeros(0, int)] * size)
                for row_of, size in self._engine.batches(prompts)
            ]
        sampling = Sampling(float(temperature), top_k, top_p, min_p)
        answers = generation.empty_answers(len(prompts))
        for batch in self._batches:
            rows = generation.in_rows(prompts, batch.row_of, batch.size)
            out, done = self._answer(batch, rows, max_new_tokens, sampling=sampling, seed=seed)
            generation.collect(
                answers, out, done, row_of=batch.row_of, stop_ids=self._engine.stop_ids
            )
        return [self._lm.text(ids) for ids in answers.ids], answers.finished

    def _answer(
        self, batch: _CachedBatch, rows, max_new_tokens: int, sampling: Sampling, seed: int
    ):
        """Answers a batch: `(out int32 [rows, max_new_tokens], done bool [rows])`."""
        lengths = np.array([len(row) for row in rows], np.int32)
        prefixes = [_prefix(old, new) for old, new in zip(batch.tokens, rows, strict=True)]
        unread = [len(row) - n for row, n in zip(rows, prefixes, strict=True)]
        width = packing.round_up(max(unread))
        # Extending pads all rows to the width of the longest, prefill packs them densely: where
        # one dialogue grew by much, reading everything again is less work.
        if batch.cache is not None and batch.size * width < lengths.sum():
            logits, written = self._extend(batch, rows, prefixes, width)
        else:
            packed = pack_prompts(rows, self._engine.devices, self._engine.platform)
            logits, batch.cache = self._engine.prefill(packed)
            written = int(packed.width)
            batch.slots = [np.arange(written - n, written) for n in lengths]
        pieces = self._engine.pieces(
            sampling,
            max_new_tokens,
            logits=logits,
            cache=batch.cache,
            written=written,
            prompt_len=lengths,
            keys=self._engine.keys(seed, batch.row_of, batch.size),
        )
        state = generation.last(pieces)
        out, done = fetch((state.out[0], state.done[0]))
        # Decoding ends before the last token of an answer is read, so the cache may lack it.
        answers = [row[row >= 0][:-1] for row in out]
        batch.tokens = [[*row, *new.tolist()] for row, new in zip(rows, answers, strict=True)]
        batch.slots = [
            np.concatenate([old, written + np.arange(len(new))])
            for old, new in zip(batch.slots, answers, strict=True)
        ]
        batch.cache = None
        if not self._lm.config.windowed_layers:
            kept = sum(_bytes(b.cache) for b in self._batches)
            batch.cache = state.cache if kept + _bytes(state.cache) <= CACHE_BYTES else None
        return out, done

    def _extend(self, batch: _CachedBatch, rows, prefixes: list[int], width: int):
        """Reads each row behind its prefix in the cache: `(logits, slots written)`."""
        kept = [slots[:n] for slots, n in zip(batch.slots, prefixes, strict=True)]
        start = max(int(slots[-1]) + 1 if len(slots) else 0 for slots in kept)
        written = start + width
        cache, batch.cache = batch.cache, None  # the program overwrites its memory
        room = cache_length(written + 1, self._engine.platform)
        room = max(room, cache.valid.shape[-1])
        cache = decoding.grow(cache, room)
        tokens, positions = (np.zeros((batch.size, width), np.int32) for _ in range(2))
        new, valid = np.zeros((batch.size, width), bool), np.zeros((batch.size, room), bool)
        for r, (row, slots) in enumerate(zip(rows, kept, strict=True)):
            behind = slice(width - (len(row) - len(slots)), width)
            tokens[r, behind] = row[len(slots) :]
            positions[r, behind] = np.arange(len(slots), len(row))
            new[r, behind] = True
            # Slots of tokens that the dialogue no longer has are hidden from attention.
            valid[r, slots] = True
        cache = cache._replace(valid=jnp.asarray(valid), length=jnp.int32(start))
        logits, batch.cache = self._engine.extend(tokens, positions, new, cache)
        batch.slots = [
            np.concatenate([slots, np.arange(written - (len(row) - len(slots)), written)])
            for row, slots in zip(rows, kept, strict=True)
        ]
        return logits, written


def _prefix(cached: Sequence[int], row: Sequence[int]) -> int:
    """Returns the length of the common prefix, at most all of `row` but its last token.

    The last token is always read again: its logits give the first token of the answer.
    """
    count = 0
    for a, b in zip(cached, row[:-1], strict=False):
        if a != b:
            break
        count += 1
    return count


def _bytes(cache: KVCache | None) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(cache))
