"""The host's side of a search: what answers cost, what they are worth, and which go on."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import numpy as np

from fedsafe_jax.data.examples import Messages
from fedsafe_jax.guarding.blocks import Answers
from fedsafe_jax.guarding.contract import Reward, Risk
from fedsafe_jax.guarding.decodings import Search
from fedsafe_jax.inference.language_model import LanguageModel

MOST_RISK = 1.0 - 1e-6  # a guard that is sure costs 13.8 nats, not infinity
SURE = 0.5  # an unfinished answer goes on where a critic gives it more than this chance


class Foresight(Protocol):
    """What an answer will come to, as `critic.Critic` tells it."""

    def __call__(
        self, rows: Sequence[Sequence[int]], budget: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns for token ids of prompts with the beginnings of answers `(probability that the
        budget lasts, expected reward in the end)`, float32 `[n]` each; `budget` is what is left,
        float32 `[n]`."""


class Kept(NamedTuple):
    """Answers with what they cost.

    Attributes:
      answers: the answers, `[rows, kept]`.
      cost: float64 `[rows, kept]`, -log P(safe) in nats, the highest of their beginnings so far.
      budget: float64 `[rows, kept]`, what is left.
      reward: float64 `[rows, kept]`.
      worth: float64 `[rows, kept]`, what they are ranked by; -inf where the budget is overdrawn.
    """

    answers: Answers
    cost: np.ndarray
    budget: np.ndarray
    reward: np.ndarray
    worth: np.ndarray

    def take(self, chosen: np.ndarray) -> "Kept":
        """Returns the chosen answers of each row, int `[rows, count]`."""

        def take(x: np.ndarray) -> np.ndarray:
            return np.take_along_axis(x, chosen, axis=1)

        return Kept(
            self.answers.take(chosen),
            take(self.cost),
            take(self.budget),
            reward=take(self.reward),
            worth=take(self.worth),
        )

    def replaced(self, new: "Kept", rows: np.ndarray) -> "Kept":
        """Returns these answers with those of `new` in some rows, bool `[rows]`."""
        return jax.tree.map(
            lambda a, b: np.where(rows.reshape(-1, *[1] * (a.ndim - 1)), b, a), self, new
        )


def cost_of(risk: np.ndarray) -> np.ndarray:
    """Returns -log P(safe) in nats of P(unsafe), float64; at most 13.8."""
    return -np.log1p(-np.minimum(np.asarray(risk, np.float64), MOST_RISK))


def spend(budget: np.ndarray, cost: np.ndarray, gamma: float, tokens: np.ndarray) -> np.ndarray:
    """Returns the budget that is left behind a block (arXiv 2502.01208, the state z).

    Args:
      budget: what was left before it, in nats.
      cost: what it costs, at least 0.
      gamma: discount a token.
      tokens: tokens of the block.
    """
    return (budget - cost) / gamma**tokens


class Prompts(NamedTuple):
    """The rows of a batch; a row without a prompt has empty ones.

    Attributes:
      ids: token ids of each prompt, with what its answer begins with.
      dialogues: turns of each.
      begun: token ids that each answer begins with.
    """

    ids: Sequence[Sequence[int]]
    dialogues: Sequence[Messages]
    begun: Sequence[Sequence[int]]


class Weighing(NamedTuple):
    """Weighs answers by their risk, their reward and what they will come to.

    Attributes:
      lm: whose tokens they are.
      settings: sizes of the search.
      risk, reward, critic: see `search.search`.
    """

    lm: LanguageModel
    settings: Search
    risk: Risk | None
    reward: Reward | None
    critic: Foresight | None

    def first(self, answers: Answers) -> Kept:
        """Returns the empty answers, with the whole budget."""
        nothing = np.zeros(answers.done.shape)
        budget = np.full(nothing.shape, self.settings.budget or np.inf)
        return Kept(answers, nothing, budget, reward=nothing, worth=nothing)

    def __call__(self, prompts: Prompts, kept: Kept, grown: Answers, is_last: bool) -> Kept:
        """Weighs continuations.

        Args:
          prompts: the prompts of the rows.
          kept: what was continued.
          grown: the continuations; the answer at `c` continues that at `c % kept`.
          is_last: whether they are at their longest, so that nothing more will come of them.
        """
        parents = np.tile(np.arange(grown.done.shape[1]) % kept.cost.shape[1], (len(grown.done), 1))
        before = kept.take(parents)
        tokens = (grown.out >= 0).sum(-1)
        new = tokens - (before.answers.out >= 0).sum(-1)
        texts = _Texts(self.lm, prompts, grown.out)
        cost = before.cost
        if self.settings.reads_risk:
            cost = np.maximum(cost, cost_of(texts.apply(self.risk)))
        left = spend(before.budget, cost - before.cost, self.settings.gamma, new)
        reward = grown.log_prob / np.maximum(tokens, 1)
        if self.reward is not None:
            reward = texts.apply(self.reward)
        value, sure = reward, np.ones(left.shape, bool)
        if self.critic is not None and not is_last:
            chance, expected = texts.foresee(self.critic, left)
            value = np.where(grown.done, reward, expected)
            sure = grown.done | (chance > SURE)
        worth = np.where((left > 0) & sure, value - self.settings.penalty * cost, -np.inf)
        return Kept(grown, cost, left, reward=np.asarray(reward, float), worth=worth)


class _Texts:
    """The different answers of a batch, each read once."""

    def __init__(self, lm: LanguageModel, prompts: Prompts, out: np.ndarray):
        self._shape, self._prompts = out.shape[:2], prompts
        places: dict[tuple[int, tuple[int, ...]], int] = {}
        self._place = np.full(self._shape, -1)
        for row, answers in enumerate(out):
            if not len(prompts.ids[row]):
                continue
            for n, ids in enumerate(answers):
                key = (row, tuple(ids[ids >= 0].tolist()))
                self._place[row, n] = places.setdefault(key, len(places))
        self._rows, self._ids = [row for row, _ in places], [ids for _, ids in places]
        self._lm = lm

    def apply(self, read: Risk | Reward) -> np.ndarray:
        """Returns what is read of each answer with what it begins with, float64; 0 without one."""
        texts = [
            self._lm.text([*self._prompts.begun[row], *ids])
            for row, ids in zip(self._rows, self._ids, strict=True)
        ]
        return self._spread(read([self._prompts.dialogues[row] for row in self._rows], texts))

    def foresee(self, critic: Foresight, budget: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns what a critic says of each answer; `budget` float64 `[rows, answers]`."""
        rows = [
            [*self._prompts.ids[row], *ids] for row, ids in zip(self._rows, self._ids, strict=True)
        ]
        left = np.zeros(len(rows), np.float32)
        left[self._place[self._place >= 0]] = budget[self._place >= 0]
        return tuple(map(self._spread, critic(rows, left)))

    def _spread(self, values: np.ndarray) -> np.ndarray:
        padded = np.append(np.asarray(values, np.float64), 0.0)
        return padded[self._place]


def select(grown: Kept, count: int) -> np.ndarray:
    """Returns which answers go on, int `[rows, count]`: different ones, the worthiest first.

    Where fewer are within the budget they come again in turn; where none is, the first ones.

    Args:
      grown: the answers.
      count: how many go on.
    """
    chosen = np.zeros((len(grown.worth), count), int)
    for row, worth in enumerate(grown.worth):
        known: dict[bytes, int] = {}
        for n in np.argsort(-worth, kind="stable"):
            if np.isfinite(worth[n]):
                known.setdefault(grown.answers.out[row, n].tobytes(), int(n))
        best = [*known.values()] or list(range(count))
        chosen[row] = np.resize(best, count) if len(best) < count else best[:count]
    return chosen


def avoiding(grown: Kept, rows: np.ndarray, step: int, vocab: int, frequency: float) -> np.ndarray:
    """Returns what makes tokens of failed answers rarer, float32 `[rows, vocab]`.

    Args:
      grown: answers none of which is within its budget, in some rows.
      rows: bool `[rows]`, which rows these are; 0 elsewhere.
      step: tokens before the block; the tokens behind it count.
      vocab: size of the vocabulary.
      frequency: what each occurrence in an answer takes off, over the mean of the answers.
    """
    bias = np.zeros((len(rows), vocab), np.float32)
    for row in np.flatnonzero(rows):
        ids = grown.answers.out[row, :, step:]
        np.subtract.at(bias[row], ids[ids >= 0], frequency / len(ids))
    return bias
