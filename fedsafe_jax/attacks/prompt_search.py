"""Prompts that a search tries on the models, with the best of each request so far."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fedsafe_jax.attacks.answering import answer
from fedsafe_jax.attacks.contract import (
    Attacked,
    AttackError,
    AttackPrompt,
    Score,
    Settings,
    reworded,
    without_search,
)
from fedsafe_jax.data.examples import Example
from fedsafe_jax.inference.language_model import LanguageModel


class Trial(NamedTuple):
    """What came of a prompt: an answer, of several models the one with the lowest score, and the
    mean of the scores; broken where all models answered."""

    answer: str
    score: Score


class PromptSearch:
    """Tries prompts on all models, and keeps the best one of each request.

    Args:
      models: the models.
      requests: the requests.
      settings: scores of answers, and sizes of these.

    Attributes:
      queries: int64 `[requests]`, sequences that each model has read.
      broken: numbers of the requests that a prompt has broken.
      unjudged: answers that could not be judged, which count as refusals.

    Raises:
      AttackError: the settings have no scores.
    """

    def __init__(
        self, models: Sequence[LanguageModel], requests: Sequence[Example], settings: Settings
    ):
        if settings.score is None:
            raise AttackError("a search over prompts needs scores of answers, `Settings.score`.")
        self._models, self._requests, self._settings = models, requests, settings
        self._best: dict[int, tuple[float, str]] = {}
        self.queries = np.zeros(len(requests), np.int64)
        self.broken: set[int] = set()
        self.unjudged = 0

    def attempt(self, items: Sequence[int], prompts: Sequence[str]) -> list[Trial]:
        """Asks all models some prompts.

        Args:
          items: number of the request of each prompt.
          prompts: texts in the place of the request's last turn.

        Raises:
          JudgeError: none of the answers could be judged.
        """
        if not items:
            return []
        requests = [self._requests[i] for i in items]
        asked = [
            AttackPrompt(reworded(request.messages, text))
            for request, text in zip(requests, prompts, strict=True)
        ]
        said, scores = [], []
        for lm in self._models:
            own = answer(lm, asked, self._settings.max_new_tokens, self._settings.batch_size).own
            told = self._settings.score(requests, own)
            self.unjudged += sum(one is None for one in told)
            said.append(own)
            scores.append([Score(0.0, False) if one is None else one for one in told])
        np.add.at(self.queries, list(items), 1)
        values = np.array([[one.value for one in row] for row in scores])
        worst, means = values.argmin(axis=0), values.mean(axis=0)
        trials = []
        for n, (i, text) in enumerate(zip(items, prompts, strict=True)):
            score = Score(float(means[n]), all(row[n].broken for row in scores))
            trials.append(Trial(said[worst[n]][n], score))
            # A prompt that breaks the request is better than any that does not, whatever its score.
            rank = score.value + score.broken
            if i not in self._best or rank > self._best[i][0]:
                self._best[i] = rank, text
            if score.broken:
                self.broken.add(i)
        return trials

    def attacked(self, counts: Mapping[str, int]) -> Attacked:
        """Returns the best prompt of each request, the request itself where none was tried."""
        prompts = [
            [
                AttackPrompt(
                    reworded(one.messages, self._best[i][1]) if i in self._best else one.messages
                )
            ]
            for i, one in enumerate(self._requests)
        ]
        told = dict(counts) | {"unjudged": self.unjudged}
        return without_search(prompts)._replace(queries=self.queries, counts=told)
