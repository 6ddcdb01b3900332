"""Language models under guards: what asks them sees another model, whose weights are the same."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fedsafe_jax.data.refusals import REFUSAL
from fedsafe_jax.guarding.contract import Counts, GuardError, Record, Reward, Risk
from fedsafe_jax.guarding.critic import Critic
from fedsafe_jax.guarding.decodings import Search
from fedsafe_jax.guarding.guardian import Guardian
from fedsafe_jax.guarding.search import search
from fedsafe_jax.inference import generation
from fedsafe_jax.inference.language_model import Dialogue, LanguageModel
from fedsafe_jax.inference.sampling import Sampling
from fedsafe_jax.models.decoder_config import ModelError


class Guards(NamedTuple):
    """The guards around a model.

    Attributes:
      decoding: sizes of a search that takes the place of plain decoding; None for none.
      risk, reward: what the search reads, see `search.search`.
      critic: a critic of this model's unfinished answers; None for none.
      guardian: what answers in the model's place; None for none.
      refusal: what stands in where the search finds nothing within its budget.
    """

    decoding: Search | None = None
    risk: Risk | None = None
    reward: Reward | None = None
    critic: Critic | None = None
    guardian: Guardian | None = None
    refusal: str = REFUSAL


class _Answer(NamedTuple):
    """One answer; `own` is whether the model itself says it, behind what it begins with."""

    ids: list[int]
    finished: bool
    own: bool = True


@dataclasses.dataclass(frozen=True)
class GuardedModel(LanguageModel):
    """A language model whose answers are guarded; scores and logits are the model's own.

    Attributes:
      guards: the guards.
      record: counts what they do.
    """

    guards: Guards = Guards()
    record: Record = dataclasses.field(default_factory=Record)

    @property
    def is_guarded(self) -> bool:
        """True: answers are not the model's alone."""
        return True

    def _answer_rows(
        self,
        rows: Sequence[Sequence[int]],
        dialogues: Sequence[Dialogue],
        begun: Sequence[int],
        *,
        num_adapters: int,
        **how: Any,
    ) -> list[tuple[list[str], np.ndarray]]:
        if num_adapters:
            raise ModelError("a model under guards answers under one adapter at a time.")
        said = self._guarded(rows, dialogues, [begun] * len(dialogues), **how)
        texts = [self.text([*begun, *one.ids] if one.own else one.ids) for one in said]
        return [(texts, np.array([one.finished for one in said], bool))]

    def continue_rows(
        self,
        rows: Sequence[Sequence[int]],
        dialogues: Sequence[Dialogue],
        begun: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 64,
    ) -> generation.Generated:
        """Goes on from token ids as `LanguageModel.continue_rows`, under the guards.

        What takes an answer's place stands behind the given tokens, which are not taken back.
        """
        said = self._guarded(
            rows,
            dialogues,
            begun,
            max_new_tokens=max_new_tokens,
            sampling=Sampling(float(temperature)),
            seed=seed,
            batch_size=batch_size,
        )
        finished = np.array([one.finished for one in said], bool)
        ids = [
            one.ids if one.own or not own else self._ids(f" {self.text(one.ids)}")
            for one, own in zip(said, begun, strict=True)
        ]
        return generation.Generated(ids, finished)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def answer_ids(
        self,
        dialogues: Sequence[Dialogue],
        max_new_tokens: int,
        sampling: Sampling,
        *,
        seed: int,
        batch_size: int,
    ) -> list[tuple[list[int], bool]]:
        """Returns the token ids of each answer, without the stop token, and whether it is finished.

        Args:
          dialogues: (role, text) turns that end in a user turn.
          max_new_tokens: longest answer of the model; what takes its place may be longer.
          sampling: how tokens are drawn.
          seed: seed of the samples.
          batch_size: rows decoded at once.
        """
        said = self._guarded(
            self.render(dialogues, max_new_tokens, truncate=False),
            dialogues,
            [[]] * len(dialogues),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            batch_size=batch_size,
        )
        return [(one.ids, one.finished) for one in said]

    def _guarded(
        self,
        rows: Sequence[Sequence[int]],
        dialogues: Sequence[Dialogue],
        begun: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        seed: int,
        batch_size: int,
    ) -> list[_Answer]:
        """Answers behind the guardian's door, by the search, and has the guardian read it."""
        warden = self.guards.guardian
        answers: list[_Answer | None] = [None] * len(dialogues)
        if warden is not None and warden.reads_request:
            self._take_over(dialogues, warden.flags(dialogues, [""] * len(dialogues)), answers)
        left = [i for i, answer in enumerate(answers) if answer is None]
        decoded = self._decoded(
            [rows[i] for i in left],
            [dialogues[i] for i in left],
            [begun[i] for i in left],
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            batch_size=batch_size,
        )
        for i, answer in zip(left, decoded, strict=True):
            answers[i] = answer
        if warden is not None and not warden.reads_request:
            said = [
                self.text([*own, *answer.ids] if answer.own else answer.ids)
                for own, answer in zip(begun, answers, strict=True)
            ]
            self._take_over(dialogues, warden.flags(dialogues, said), answers)
        self.record.add(Counts(answers=len(answers)))
        return answers

    def _take_over(
        self, dialogues: Sequence[Dialogue], flagged: np.ndarray, answers: list[_Answer | None]
    ) -> None:
        """Puts the guardian's replies in the place of what it flags."""
        places = np.flatnonzero(flagged)
        for i, text in zip(
            places, self.guards.guardian.reply([dialogues[i] for i in places]), strict=True
        ):
            answers[i] = _Answer(self._ids(text), finished=True, own=False)
        self.record.add(Counts(by_guardian=len(places)))

    def _decoded(
        self,
        rows: Sequence[Sequence[int]],
        dialogues: Sequence[Dialogue],
        begun: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        seed: int,
        batch_size: int,
    ) -> list[_Answer]:
        guards, settings = self.guards, self.guards.decoding
        if not dialogues:
            return []
        if settings is None:
            (plain,) = self._generate(
                rows, max_new_tokens, sampling, seed=seed, batch_size=batch_size
            )
            pairs = zip(plain.ids, plain.finished, strict=True)
            return [_Answer(ids, bool(finished)) for ids, finished in pairs]
        result = search(
            self,
            dialogues,
            settings,
            max_new_tokens=max_new_tokens,
            risk=guards.risk,
            reward=guards.reward,
            critic=guards.critic and guards.critic.of(self),
            begun=begun,
            rows=rows,
            # A search draws as it says; one answer, as it was asked for.
            sampling=sampling if settings.temperature == 0 else None,
            seed=seed,
            batch_size=batch_size,
            refusal=guards.refusal,
        )
        closed = result.failed_closed
        self.record.add(Counts(failed_closed=int(closed.sum()), tried=int(result.tried.sum())))
        return [
            _Answer(ids, bool(finished), own=not shut)
            for ids, finished, shut in zip(result.ids, result.finished, closed, strict=True)
        ]


def guard_model(lm: LanguageModel, guards: Guards) -> GuardedModel:
    """Returns a model under guards; it shares the model's parameters.

    Args:
      lm: the model; one that is under guards is put under these alone.
      guards: the guards.

    Raises:
      GuardError: the decoding reads a risk, and there is none.
    """
    if guards.decoding is not None and guards.decoding.reads_risk and guards.risk is None:
        raise GuardError(
            "a decoding with a budget or a penalty needs a guard, whose risk it reads."
        )
    if guards.critic is not None:
        guards.critic.of(lm)  # which finds that it is another model's
    fields = {f.name: getattr(lm, f.name) for f in dataclasses.fields(LanguageModel)}
    return GuardedModel(**fields, guards=guards)
