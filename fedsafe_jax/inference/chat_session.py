"""Dialogues that go on turn by turn: what was read once stays in the cache."""

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

KEPT_BYTES = 4 << 30  # of all caches together; batches beyond that are read anew


@dataclasses.dataclass
class _Batch:
    """Dialogues that are answered together.

    Attributes:
      row_of: each dialogue's row.
      size: rows.
      read: token ids by row, as they stand in the cache.
      slots: where each of these lies there.
      cache: None before the first turn, and where none is kept.
    """

    row_of: dict[int, int]
    size: int
    read: list[list[int]]
    slots: list[np.ndarray]
    cache: KVCache | None = None


class ChatSession:
    """Answers of a model to the same dialogues, call after call, while these grow.

    A call reads only what is new since the call before: critique and revision do not pay again for
    the request and the first answer. Answers are those of `LanguageModel.answer_dialogues`, but for
    the order of sums. Where a dialogue was changed, or cut to the context, it is read again from
    there. Models that look through a window read everything anew: slots of a cache that is read
    on are not places in the text.

    Args:
      lm: the model, under its adapter.
      batch_size: dialogues answered at once.
    """

    def __init__(self, lm: LanguageModel, batch_size: int = 64):
        self._lm = lm
        self._engine = generation.Engine(
            lm.model,
            lm.params,
            lm.factors,
            stop_ids=lm.stop_ids,
            batch_size=batch_size,
            mesh=lm.mesh,
        )
        self._batches: list[_Batch] = []

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
        """As `LanguageModel.answer_dialogues`; the dialogues keep their places between calls."""
        prompts = self._lm.render(dialogues, max_new_tokens, truncate)
        generation.check_lengths(prompts, self._lm.config.max_length - max_new_tokens)
        if sum(len(b.row_of) for b in self._batches) != len(prompts):
            self._batches = [
                _Batch(row_of, size, [[]] * size, slots=[np.zeros(0, int)] * size)
                for row_of, size in self._engine.batches(prompts)
            ]
        sampling = Sampling(float(temperature), top_k, top_p, min_p)
        found = generation.empty_answers(len(prompts))
        for batch in self._batches:
            rows = generation.in_rows(prompts, batch.row_of, batch.size)
            out, done = self._answer(batch, rows, max_new_tokens, sampling, seed)
            generation.collect(found, out, done, batch.row_of, self._engine.stop_ids)
        return [self._lm.text(ids) for ids in found.ids], found.finished

    def _answer(self, batch: _Batch, rows, max_new_tokens: int, sampling: Sampling, seed: int):
        """Answers of a batch: `(out int32 [rows, max_new_tokens], done bool [rows])`."""
        lengths = np.array([len(row) for row in rows], np.int32)
        keys = self._engine.keys(seed, batch.row_of, batch.size)
        shared = [_common(old, new) for old, new in zip(batch.read, rows, strict=True)]
        width = packing.round_up(max(len(row) - n for row, n in zip(rows, shared, strict=True)))
        if batch.cache is not None and batch.size * width < lengths.sum():
            logits, written = self._extend(batch, rows, shared, width)
        else:
            packed = pack_prompts(rows, self._engine.devices)
            logits, batch.cache = self._engine.prefill(packed)
            written = int(packed.width)
            batch.slots = [np.arange(written - n, written) for n in lengths]
        state = self._engine.answer(
            sampling, max_new_tokens, logits, batch.cache, written, lengths, keys
        )
        out, done = jax.device_get((state.out[0], state.done[0]))
        # All but the last token of an answer were surely read.
        answers = [row[row >= 0][:-1] for row in out]
        batch.read = [[*row, *new.tolist()] for row, new in zip(rows, answers, strict=True)]
        batch.slots = [
            np.concatenate([old, written + np.arange(len(new))])
            for old, new in zip(batch.slots, answers, strict=True)
        ]
        batch.cache = None
        if not self._lm.config.windowed_layers:
            kept = sum(_bytes(b.cache) for b in self._batches)
            batch.cache = state.cache if kept + _bytes(state.cache) <= KEPT_BYTES else None
        return out, done

    def _extend(self, batch: _Batch, rows, shared: list[int], width: int):
        """Reads the rows from where they differ from what was read: `(logits, slots written)`."""
        kept = [slots[:n] for slots, n in zip(batch.slots, shared, strict=True)]
        start = max(int(slots[-1]) + 1 if len(slots) else 0 for slots in kept)
        written = start + width
        cache, batch.cache = batch.cache, None  # its memory is written to
        room = max(cache_length(written + 1), cache.valid.shape[-1])
        cache = decoding.grow(cache, room)
        tokens, positions = (np.zeros((batch.size, width), np.int32) for _ in range(2))
        new, valid = np.zeros((batch.size, width), bool), np.zeros((batch.size, room), bool)
        for r, (row, slots) in enumerate(zip(rows, kept, strict=True)):
            behind = slice(width - (len(row) - len(slots)), width)
            tokens[r, behind] = row[len(slots) :]
            positions[r, behind] = np.arange(len(slots), len(row))
            new[r, behind] = True
            valid[r, slots] = True
        cache = cache._replace(valid=jnp.asarray(valid), length=jnp.int32(start))
        logits, batch.cache = self._engine.extend(tokens, positions, new, cache)
        batch.slots = [
            np.concatenate([slots, np.arange(written - (len(row) - len(slots)), written)])
            for row, slots in zip(rows, kept, strict=True)
        ]
        return logits, written


def _common(old: Sequence[int], new: Sequence[int]) -> int:
    """Length of the common beginning, without the last token of `new`: its logits are needed."""
    count = 0
    for a, b in zip(old, new[:-1], strict=False):
        if a != b:
            break
        count += 1
    return count


def _bytes(cache: KVCache | None) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(cache))
