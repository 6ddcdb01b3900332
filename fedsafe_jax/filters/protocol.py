"""Interface of every filter: an object that scores (dialogue, response) pairs."""

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from fedsafe_jax.data.examples import SAFE, UNSAFE, Example, Messages
from fedsafe_jax.filters.decision import Decision, FilterError
from fedsafe_jax.random_streams import Purpose, generator


class SafetyFilter(Protocol):
    """A filter on pairs; it judges the answer, not the question, in its whole dialogue.

    Attributes:
      decision: calibration and threshold.
    """

    decision: Decision

    def log_odds(self, pairs: Sequence[Example]) -> np.ndarray:
        """Returns the raw log-odds that each response is unsafe, float32 `[n]`."""

    def score(self, pairs: Sequence[Example]) -> np.ndarray:
        """Returns the calibrated P(unsafe) of each response, float32 `[n]`."""


def labelled(pairs: Sequence[Example]) -> tuple[list[Example], np.ndarray]:
    """Returns the pairs that have a label, and whether each is unsafe, int32 `[n]`.

    Raises:
      FilterError: only one of the labels occurs, or none.
    """
    known = [e for e in pairs if e.label in (SAFE, UNSAFE)]
    unsafe = np.array([e.label == UNSAFE for e in known], np.int32)
    if len(set(unsafe.tolist())) < 2:
        label = known[0].label if known else "none"
        raise FilterError(
            f"filter data: needs both safe and unsafe pairs, found {len(known)} labelled, all "
            f"{label}; add a source of the other kind to filter.sources."
        )
    return known, unsafe


def split(pairs: Sequence[Example], seed: int, share: float) -> tuple[list[int], list[int]]:
    """Splits by the whole dialogue before the answer, so that none is on both sides.

    Args:
      pairs: pairs to split.
      seed: seed of the order in which dialogues are held out.
      share: share of the dialogues that is held out.

    Returns:
      Indices of the pairs for training, and of those for validation.
    """
    prompts = sorted({e.dialogue for e in pairs})
    rng = generator(Purpose.FILTER_SPLIT, seed)
    order = rng.permutation(len(prompts))
    held = {prompts[i] for i in order[: round(share * len(prompts))]}
    sides = [e.dialogue in held for e in pairs]
    return (
        [i for i, side in enumerate(sides) if not side],
        [i for i, side in enumerate(sides) if side],
    )


def answer_risk(
    safety_filter: SafetyFilter,
) -> Callable[[Sequence[Messages], Sequence[str]], np.ndarray]:
    """Returns the function `(dialogues, answers) -> P(unsafe)` that `cai.revise.Judge` takes."""

    def unsafe(dialogues: Sequence[Messages], answers: Sequence[str]) -> np.ndarray:
        pairs = zip(dialogues, answers, strict=True)
        return safety_filter.score([Example(tuple(turns), answer) for turns, answer in pairs])

    return unsafe


def warn_of_cuts(cut: int, count: int, max_length: int) -> None:
    """Logs in one line how many of `count` pairs were cut; nothing where none was."""
    if cut:
        logging.warning(
            "%d of %d pairs are longer than filter.max_length=%d tokens: of these the filter reads "
            "the answer's beginning, the end of the dialogue and the system prompt",
            cut,
            count,
            max_length,
        )
