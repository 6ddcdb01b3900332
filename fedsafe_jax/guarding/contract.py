"""What guards share: the risk that they read, and what went on while they answered."""

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fedsafe_jax.data.examples import Messages
from fedsafe_jax.evals.judges import HARM, Answered, Judge

# `(dialogues, answers) -> P(unsafe) of each answer`, float32 `[n]`; an answer may be unfinished.
Risk = Callable[[Sequence[Messages], Sequence[str]], np.ndarray]
# The same shape, of what is wanted of an answer: greater is better.
Reward = Callable[[Sequence[Messages], Sequence[str]], np.ndarray]


class GuardError(ValueError):
    """A guard cannot be made or run as asked; the message names what is missing."""


def risk_of(judge: Judge) -> Risk:
    """Returns the risk that a judge of harm reads; an answer that it fails on has a risk of 1.

    Args:
      judge: a judge of harm, such as one of `guard:FOLDER`.

    Raises:
      GuardError: the judge measures something else.
    """
    if judge.measures != HARM:
        raise GuardError(
            f"guard '{judge.spec}': it tells {judge.measures}, not harm; give a guard, such as "
            "guard:FOLDER of a model or of what `fedsafe train-filter` wrote."
        )

    def risk(dialogues: Sequence[Messages], answers: Sequence[str]) -> np.ndarray:
        scores = [verdict.score for verdict in judge.judge(handed_out(dialogues, answers))]
        known = np.array([np.nan if score is None else score for score in scores], np.float32)
        return np.where(np.isfinite(known), 1 - known, 1).astype(np.float32)

    return risk


def handed_out(dialogues: Sequence[Messages], answers: Sequence[str]) -> list[Answered]:
    """Returns answers as a guard is to read them: all that is handed out.

    Judges leave out a thought. A guard must not, as the user reads it too: without its marks it is
    text like any other.
    """
    return [
        Answered(tuple(turns), without_marks(answer))
        for turns, answer in zip(dialogues, answers, strict=True)
    ]


def without_marks(answer: str) -> str:
    """Returns an answer without the marks of a thought."""
    return answer.replace("<think>", " ").replace("</think>", " ")


class Counts(NamedTuple):
    """What guards did with the answers of a model.

    Attributes:
      answers: answers that were asked for.
      by_guardian: answers that a guardian gave in the model's place.
      failed_closed: answers that became a refusal, as a search found none within its budget.
      tried: candidates that a search generated.
    """

    answers: int = 0
    by_guardian: int = 0
    failed_closed: int = 0
    tried: int = 0


class Record:
    """Counts what guards do, over all calls and threads."""

    def __init__(self) -> None:
        self._lock, self._counts = threading.Lock(), Counts()

    def add(self, new: Counts) -> None:
        """Adds counts."""
        with self._lock:
            self._counts = Counts(*map(sum, zip(self._counts, new, strict=True)))

    def take(self) -> Counts:
        """Returns the counts since the last call."""
        with self._lock:
            taken, self._counts = self._counts, Counts()
        return taken
