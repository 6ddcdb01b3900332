"""What is served: one base model, itself and under adapters, each by a name."""

import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from fedsafe_jax import random_streams
from fedsafe_jax.data import packing
from fedsafe_jax.data.examples import Messages
from fedsafe_jax.inference import generation
from fedsafe_jax.inference.language_model import Dialogue, LanguageModel
from fedsafe_jax.inference.prompt_packing import PACKED_TOKENS, pack_prompts
from fedsafe_jax.inference.sampling import Sampling
from fedsafe_jax.models import adapter_stack, lora, owned_lora
from fedsafe_jax.models.decoder import Decoder
from fedsafe_jax.models.sharding import fetch
from fedsafe_jax.random_streams import Purpose
from fedsafe_jax.serving import token_scores
from fedsafe_jax.serving.row_counts import RowCounts
from fedsafe_jax.serving.token_scores import TokenScores


class Draw(NamedTuple):
    """A prompt that is to be continued.

    Attributes:
      ids: token ids of the prompt.
      max_tokens: longest answer.
      seed, place: seed of the samples, and the prompt's place in its request: what is drawn is what
        `LanguageModel.generate` draws for the prompt at that place of its list.
      dialogue: turns of a chat, () of a text.
    """

    ids: Sequence[int]
    max_tokens: int
    seed: int
    place: int
    dialogue: Messages = ()


class ServedModels:
    """A base model and its adapters, which share the base's parameters.

    The tokenizer may be used from any thread; `generate` and `score` from one alone.

    Args:
      lm: the base model.
      name: its name for clients.
      adapters: adapters by their names.
      batch_size: rows decoded at once.
      max_length: most tokens of prompt and answer; 0 for the model's context.

    Raises:
      ModelError: an adapter belongs to a base of another shape.
    """

    is_guarded = False  # whether only whole answers to dialogues are given

    def __init__(
        self,
        lm: LanguageModel,
        name: str,
        adapters: Mapping[str, lora.Adapter],
        batch_size: int = 64,
        max_length: int = 0,
    ):
        self._tokenizer, self._lock, self._lm = lm.tokenizer, threading.Lock(), lm
        # A tokenizer changes its settings at the first text alone, which must not meet a decoding.
        self.encode("a")
        # On the device once: factors read from a file would be sent there with each batch.
        placed = {
            key: one._replace(factors=jax.tree.map(jax.numpy.asarray, one.factors))
            for key, one in adapters.items()
        }
        self._models = {name: lm} | {key: lm.with_adapter(one) for key, one in placed.items()}
        self._batch_size, self._rows_for = batch_size, RowCounts()
        self.max_length = min(max_length or lm.config.max_length, lm.config.max_length)
        self.vocab_size = lm.config.vocab_size
        self.stop_ids = frozenset(lm.stop_ids)
        self._engine = functools.cache(self._make_engine)
        self._mixed = functools.cache(self._make_mixed)
        self._alone = {key for key, one in placed.items() if not adapter_stack.is_finite(one)}
        self._shared = {key: one for key, one in placed.items() if key not in self._alone}
        self._places = {key: i for i, key in enumerate(self._shared)}

    @property
    def names(self) -> list[str]:
        """Names of the models, the base's first."""
        return list(self._models)

    def render(self, dialogue: Dialogue) -> list[int]:
        """Returns the token ids of a chat, with the header of the answer.

        Raises:
          ChatTemplateError: the chat template refuses the roles or their order.
        """
        with self._lock:
            return self._lm.render([dialogue], 0, truncate=False)[0]

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text, with those that the tokenizer puts before any text."""
        with self._lock:
            return list(self._tokenizer(text)["input_ids"])

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of token ids.

        It waits for no lock, as the loop that serves all clients calls it, and a long prompt takes
        seconds to encode.
        """
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def group(self, model: str) -> str:
        """Returns what models that answer in one batch have in common.

        All do, but for an adapter whose factors are no numbers, which would spoil its neighbours.
        """
        return model if model in self._alone else ""

    def generate(
        self, models: Sequence[str], sampling: Sampling, draws: Sequence[Draw]
    ) -> Iterator[list[tuple[list[int], bool]]]:
        """Continues prompts, each under its model, in pieces as the cache fills up.

        Args:
          models: name of each prompt's model, all of one group.
          sampling: how tokens are drawn.
          draws: the prompts, at most `batch_size`.

        Yields:
          The answers so far: for each prompt its token ids, with the stop token at the end of one
          that is done, and whether it is done. They may be longer than `max_tokens`, as they are
          decoded together.
        """
        owners = None
        if len(set(models)) == 1:
            engine = self._engine(models[0])
        else:
            engine = self._mixed()
        ((row_of, size),) = engine.batches([draw.ids for draw in draws], self._rows_for)
        prompts = generation.in_rows([draw.ids for draw in draws], row_of, size)
        packed = pack_prompts(prompts, engine.devices, engine.platform, least=PACKED_TOKENS)
        if len(set(models)) > 1:
            owners = np.full(size, owned_lora.NOBODY, np.int32)
            for i, row in row_of.items():
                owners[row] = self._places.get(models[i], owned_lora.NOBODY)
        logits, cache = engine.prefill(packed, owners)
        states = engine.pieces(
            sampling,
            packing.round_up(max(draw.max_tokens for draw in draws)),
            logits=logits,
            cache=cache,
            written=int(packed.width),
            prompt_len=packed.valid.sum(-1, dtype=np.int32),
            keys=_keys(draws, row_of, size),
            owners=owners,
        )
        for state in states:
            out, done = fetch((state.out[0], state.done[0]))
            rows = [row_of[i] for i in range(len(draws))]
            yield [(out[row][out[row] >= 0].tolist(), bool(done[row])) for row in rows]

    def score(self, model: str, sequences: Sequence[Sequence[int]], top: int) -> list[TokenScores]:
        """Scores the tokens of each sequence under one model, see `token_scores.score_tokens`."""
        return token_scores.score_tokens(self._models[model], sequences, top)

    def _make_engine(self, model: str) -> generation.Engine:
        lm = self._models[model]
        return self._engine_of(lm.model, lm.factors)

    def _make_mixed(self) -> generation.Engine:
        """The engine of all adapters at once; their factors are on the device a second time."""
        factors, scale = adapter_stack.stack(list(self._shared.values()))
        return self._engine_of(Decoder(self._lm.config, scale), factors)

    def _engine_of(self, model: Decoder, factors: dict | None) -> generation.Engine:
        return generation.Engine(
            model,
            self._lm.params,
            factors,
            stop_ids=self._lm.stop_ids,
            batch_size=self._batch_size,
            mesh=self._lm.mesh,
        )


def _keys(draws: Sequence[Draw], row_of: Mapping[int, int], size: int) -> jax.Array:
    """Returns PRNG keys `[1, rows]`: those that `Engine.keys` gives each seed and place.

    Requests bring seeds of their own, and still share a batch.
    """
    by_row = {row_of[i]: draw for i, draw in enumerate(draws)}
    blank = Draw((), 0, 0, place=0)
    rows = [by_row.get(row, blank) for row in range(size)]
    roots = {seed: random_streams.key(Purpose.SAMPLES, seed) for seed in {r.seed for r in rows}}
    places = np.array([row.place for row in rows], np.uint32)
    return _fold(jax.numpy.stack([roots[row.seed] for row in rows]), places)


@jax.jit
def _fold(roots, places):
    """Folds the group, which is 0, and the place into each root, as `Engine.keys` does."""
    fold = jax.vmap(jax.random.fold_in)
    groups = jax.numpy.zeros_like(places)
    return fold(fold(roots, groups), places)[None]
