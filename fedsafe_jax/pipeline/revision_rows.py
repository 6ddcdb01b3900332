"""What a round of Constitutional AI trains on: records and replay as packed steps."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from ml_collections import ConfigDict

from fedsafe_jax.cai import derta
from fedsafe_jax.cai.losses import KL, SFT
from fedsafe_jax.cai.revise import Record
from fedsafe_jax.cai.steps import Recipe, Step, make_steps
from fedsafe_jax.data import chat, dialogue_notes
from fedsafe_jax.data.chat import Encoded
from fedsafe_jax.data.dialogue_notes import CUT
from fedsafe_jax.data.examples import Example, Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_recipe(config: ConfigDict) -> Recipe:
    """Reads from the config how a round trains."""
    c = config.cai
    return Recipe(
        losses=tuple(c.losses),
        weights=tuple(c.weights),
        beta=c.beta,
        batch_size=c.batch_size,
        pairs_per_step=c.pairs_per_step,
        seq=config.seq_len,
    )


@dataclasses.dataclass(frozen=True)
class RevisionRows:
    """Makes rows of records and replay.

    Attributes:
      config: config of the run.
      tokenizer: the model's tokenizer.
      recipe: how a round trains.
      seed: seed of the run.
    """

    config: ConfigDict
    tokenizer: "PreTrainedTokenizerBase"
    recipe: Recipe
    seed: int

    def imitation(
        self, kept: Sequence[Record], replay: Sequence[Example]
    ) -> tuple[list[Encoded], int, int, dict[str, int]]:
        """Encodes the replay, and the revisions where the losses imitate them.

        Args:
          kept: records that may be trained on.
          replay: benign examples.

        Returns:
          `(dialogues, how many of them are replay, those lost because their requests alone fill a
          row, notes)`. The replay is first. The notes, see `dialogue_notes.count`, are of replay
          and revisions in any case.
        """
        said = [(e.messages, e.response) for e in replay] + [(r.turns, r.revision) for r in kept]
        fitted = [self._fitted(turns, answer) for turns, answer in said]
        encoded = [
            self.encode(turns, answer) for turns, (_, answer) in zip(fitted, said, strict=True)
        ]
        for i, example in enumerate(replay):
            if not example.ended and encoded[i] is not None:
                encoded[i] = chat.without_end(self.tokenizer, encoded[i])
        notes = dialogue_notes.count(encoded)
        short = [
            CUT in one.notes or left != turns
            for one, left, (turns, _) in zip(encoded, fitted, said, strict=True)
            if one is not None
        ]
        if any(short):  # cut here, or in the encoding
            notes["cut"] = sum(short)
        if not self.recipe.imitates_revisions:
            encoded = encoded[: len(replay)]
        left = [e for e in encoded if e is not None]
        replayed = sum(e is not None for e in encoded[: len(replay)])
        return left, replayed, len(encoded) - len(left), notes

    def triples(self, kept: Sequence[Record]) -> list[derta.Triple]:
        """Returns what preference losses and DeRTa learn from: answers with their revisions."""
        triples = []
        for r in kept:
            if r.preferred:
                turns = self._fitted(r.turns, r.initial, r.revision)
                messages = turns if r.messages else ()
                triples.append(derta.Triple(r.prompt, r.initial, r.revision, messages=messages))
        return triples

    def steps(
        self,
        count: int,
        imitation: Sequence[Encoded],
        replayed: int,
        triples: Sequence[derta.Triple],
        t: int,
    ) -> list[Step]:
        """Packs the data of `count` steps.

        Args:
          count: number of steps.
          imitation, replayed: as of `imitation`.
          triples: pairs that are learned from.
          t: number of the round, from 0.
        """
        refusal = 0
        if self.recipe.own_rows:
            refusal = derta.refusal_token(self.tokenizer, self.config.cai.refusal_word)
        return make_steps(
            self.recipe,
            count,
            imitation,
            triples=triples,
            encode=self.encode,
            seed=(self.seed, t),
            replayed=replayed,
            tokenizer=self.tokenizer,
            refusal=refusal,
        )

    def encode(self, messages: Messages, response: str) -> Encoded | None:
        """Encodes a dialogue with its answer; None where no target is left within a row."""
        return chat.encode(self.tokenizer, messages, response, self.config.seq_len)

    def _fitted(self, messages: Messages, *answers: str) -> Messages:
        """A dialogue of several turns, so cut that each of the answers ends within a row.

        A single request is left as it is: there the answer is cut.
        """
        if len(messages) == 1:
            return messages
        return chat.before_answers(self.tokenizer, messages, answers, self.config.seq_len)


def training_counts(taken: Sequence[Step], losses: Sequence[dict]) -> dict:
    """Counts the steps and tokens of a round's training, and takes the mean of each loss.

    Args:
      taken: data of the steps.
      losses: losses of each.
    """
    batches = [b for s in taken for b in (s.imitation, *s.rows.values(), s.held) if b is not None]
    batches += [s.pairs.rows for s in taken if s.pairs]
    tokens = int(sum((b.segment_ids > 0).sum() for b in batches))
    by_loss: dict[str, list[float]] = {}
    for step, values in zip(taken, losses, strict=True):
        # Under "kl" a step may have drawn revisions alone, or replay alone.
        rows = {SFT: step.imitation, KL: step.held}
        empty = {name for name, b in rows.items() if b is not None and not b.mask.any()}
        for name in values.keys() - empty:
            by_loss.setdefault(name, []).append(float(values[name]))
    means = {f"{name}_loss": float(np.mean(by_loss[name])) for name in sorted(by_loss)}
    return {"steps": len(losses), "tokens_trained": tokens} | means
