"""What every filter is: something that scores (prompt, response) pairs."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from fedsafe_jax.data.examples import SAFE, UNSAFE, Example
from fedsafe_jax.filters.decision import Decision


class FilterError(ValueError):
    """The filter cannot be trained, loaded, or read pairs, as configured."""


class SafetyFilter(Protocol):
    """A filter on pairs; what is unsafe is the answer, not the question."""

    decision: Decision

    def log_odds(self, pairs: Sequence[Example]) -> np.ndarray:
        """Raw log-odds that each response is unsafe, float32 `[n]`."""

    def score(self, pairs: Sequence[Example]) -> np.ndarray:
        """Calibrated P(unsafe), float32 `[n]`."""


def labelled(pairs: Sequence[Example]) -> tuple[list[Example], np.ndarray]:
    """The pairs with a label, and whether each is unsafe, int32 `[n]`.

    Raises:
      FilterError: not both labels occur.
    """
    known = [e for e in pairs if e.label in (SAFE, UNSAFE)]
    unsafe = np.array([e.label == UNSAFE for e in known], np.int32)
    if len(set(unsafe.tolist())) < 2:
        found = known[0].label if known else "none"
        raise FilterError(
            f"filter data: needs both safe and unsafe pairs, found {len(known)} labelled, all "
            f"{found}; add a source of the other kind to filter.sources."
        )
    return known, unsafe


def split(pairs: Sequence[Example], seed: int, share: float) -> tuple[list[int], list[int]]:
    """Indices for training and validation, split by prompt, so that none is on both sides."""
    prompts = sorted({e.prompt for e in pairs})
    rng = np.random.default_rng([seed, 12])
    order = rng.permutation(len(prompts))
    held = {prompts[i] for i in order[: round(share * len(prompts))]}
    sides = [e.prompt in held for e in pairs]
    return (
        [i for i, side in enumerate(sides) if not side],
        [i for i, side in enumerate(sides) if side],
    )


def answer_risk(found):
    """`(prompts, answers) -> P(unsafe)` by a filter, for `cai.revise.Judge`."""

    def unsafe(prompts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        pairs = zip(prompts, answers, strict=True)
        return found.score([Example((("user", p),), a) for p, a in pairs])

    return unsafe
