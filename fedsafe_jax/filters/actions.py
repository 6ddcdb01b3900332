"""What a client does with a pair that its filter calls unsafe."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fedsafe_jax.data.examples import UNSAFE, Example
from fedsafe_jax.data.refusals import REFUSAL

ACTIONS = ("drop", "replace", "rewrite", "mask", "weight")


class FilterCounts(NamedTuple):
    """One client's filtering; the unsafe counts are known in simulation only.

    `kept` are pairs that the filter let pass; the others were dropped, rewritten (also: replaced by
    a refusal), masked, or weighted down.
    """

    kept: int
    dropped: int
    rewritten: int
    masked: int
    weighted: int
    unsafe_kept: int
    unsafe_flagged: int


class FilteredPairs(NamedTuple):
    """What is left of a client's pairs.

    Attributes:
      examples: to train on.
      weights: float32 `[examples]`, of their losses; 0 keeps the dialogue without learning from it.
      flagged: bool `[n]`, of the pairs given.
      counts: see `FilterCounts`.
      by_category: flagged and all pairs of each category, `{name: (flagged, all)}`.
    """

    examples: list[Example]
    weights: np.ndarray
    flagged: np.ndarray
    counts: FilterCounts
    by_category: dict[str, tuple[int, int]]


def apply(
    action: str,
    examples: Sequence[Example],
    probability: np.ndarray,
    threshold: float,
    rewrite: Callable | None = None,
) -> FilteredPairs:
    """Acts on the pairs from `threshold` on.

    Args:
      action: `drop` (the paper); `replace` the answer by a refusal; `rewrite` it, so that the
        prompt becomes a safety signal; `mask`: keep the dialogue without learning its answer;
        `weight`: scale the loss of every pair, flagged or not, by P(safe).
      examples: one client's pairs.
      probability: P(unsafe) of each, float `[n]`.
      threshold: from which a pair is flagged.
      rewrite: `examples -> list of answers`, for `rewrite`; a pair whose answer comes back empty
        is dropped.
    """
    probability = np.asarray(probability, np.float32)
    flagged = probability >= threshold
    unsafe = np.array([e.label == UNSAFE for e in examples], bool)
    answers: dict[int, str] = {}
    if action == "rewrite":
        places = np.flatnonzero(flagged).tolist()
        written = rewrite([examples[i] for i in places]) if places else []
        answers = dict(zip(places, written, strict=True))
    elif action == "replace":
        answers = dict.fromkeys(np.flatnonzero(flagged).tolist(), REFUSAL)
    kept, weights = [], []
    done = dict.fromkeys(("dropped", "rewritten", "masked", "weighted"), 0)
    for i, example in enumerate(examples):
        weight = 1.0
        if action == "weight":
            weight = 1.0 - float(probability[i])
        if flagged[i]:
            if action in ("replace", "rewrite") and answers[i].strip():
                example = example._replace(response=answers[i].strip())
                done["rewritten"] += 1
            elif action == "mask":
                weight = 0.0
                done["masked"] += 1
            elif action == "weight":
                done["weighted"] += 1
            else:
                done["dropped"] += 1
                continue
        kept.append(example)
        weights.append(weight)
    categories: dict[str, tuple[int, int]] = {}
    for example, flag in zip(examples, flagged.tolist(), strict=True):
        seen = categories.get(example.category, (0, 0))
        categories[example.category] = (seen[0] + flag, seen[1] + 1)
    counts = FilterCounts(
        int((~flagged).sum()),
        **done,
        unsafe_kept=int((unsafe & ~flagged).sum()),
        unsafe_flagged=int((unsafe & flagged).sum()),
    )
    return FilteredPairs(
        kept, np.asarray(weights, np.float32), flagged, counts=counts, by_category=categories
    )


def simulated(
    examples: Sequence[Example], recall: float, precision: float, seed: Sequence[int]
) -> np.ndarray:
    """The verdicts of a filter with a given recall and precision, as probabilities 0 or 1.

    Args:
      examples: with their labels.
      recall: share of unsafe pairs that are flagged.
      precision: share of flagged pairs that are unsafe; decides how many safe ones are flagged.
      seed: of which. A larger recall flags the same pairs and more.
    """
    unsafe = np.array([e.label == UNSAFE for e in examples], bool)
    draws = np.random.default_rng(seed).random(len(examples))
    false_alarms = recall * unsafe.sum() * (1 - precision) / max(precision, 1e-9)
    rate = min(false_alarms / max((~unsafe).sum(), 1), 1.0)
    return (draws < np.where(unsafe, recall, rate)).astype(np.float32)
