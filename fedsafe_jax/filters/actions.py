"""Actions: what a client does with the pairs that its filter flags."""

import collections
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fedsafe_jax.data.examples import UNSAFE, Example
from fedsafe_jax.data.refusals import REFUSAL
from fedsafe_jax.filters.decision import flag


class FilterCounts(NamedTuple):
    """Counts of one client's pairs after filtering.

    Attributes:
      kept: pairs that the filter did not flag.
      dropped, rewritten, masked, weighted: flagged pairs, by what was done with them; an answer
        replaced by a refusal, or turning into one, counts as rewritten.
      unsafe_kept, unsafe_flagged: pairs labelled unsafe; labels are known in simulation only.
    """

    kept: int
    dropped: int
    rewritten: int
    masked: int
    weighted: int
    unsafe_kept: int
    unsafe_flagged: int


class NewAnswer(NamedTuple):
    """A new answer to a flagged pair.

    Attributes:
      text: the answer; "" where none is of use.
      rejected: why what was written is of no use; "" where it is of use, or nothing says why.
    """

    text: str
    rejected: str = ""


class FilteredPairs(NamedTuple):
    """One client's pairs after filtering.

    Attributes:
      examples: pairs to train on.
      weights: float32 `[examples]`, factors on their losses; 0 keeps a dialogue in the batch
        without learning from it. Their sum is the client's weight in the aggregation.
      flagged: bool `[n]`, verdict on each pair given.
      counts: see `FilterCounts`.
      by_category: flagged and all pairs of each category, `{name: (flagged, all)}`.
      rejected: new answers that were not taken, `{reason: number}`; {} where nothing says why.
    """

    examples: list[Example]
    weights: np.ndarray
    flagged: np.ndarray
    counts: FilterCounts
    by_category: dict[str, tuple[int, int]]
    rejected: dict[str, int]


class Treated(NamedTuple):
    """One pair after an action.

    Attributes:
      example: the pair to train on; None for a dropped one.
      weight: factor on the loss of the pair.
      counted: field of `FilterCounts` that the pair adds to.
    """

    example: Example | None
    weight: float
    counted: str


def keep(example: Example, p_unsafe: float, answer: str = "") -> Treated:
    """Keeps the pair as it is. Arguments are those of every action on a pair.

    Args:
      example: the pair.
      p_unsafe: P(unsafe) of the pair.
      answer: new answer to the request; "" where none was written.
    """
    del p_unsafe, answer
    return Treated(example, 1.0, "kept")


def drop(example: Example, p_unsafe: float, answer: str = "") -> Treated:
    """Drops the pair, as in the paper."""
    del example, p_unsafe, answer
    return Treated(None, 1.0, "dropped")


def rewrite(example: Example, p_unsafe: float, answer: str = "") -> Treated:
    """Exchanges the answer for the new one, so that the prompt becomes a safety signal; drops the
    pair where the new answer is empty."""
    if not answer.strip():
        return drop(example, p_unsafe)
    return Treated(example._replace(response=answer.strip()), 1.0, "rewritten")


def replace(example: Example, p_unsafe: float, answer: str = "") -> Treated:
    """Replaces the answer by a refusal."""
    del answer
    return rewrite(example, p_unsafe, REFUSAL)


def turn(example: Example, p_unsafe: float, answer: str = "") -> Treated:
    """Lets the answer turn into a refusal on its way: DeRTa's two rows, see `cai.derta`.

    They share the pair's weight. An empty answer is replaced, as nothing leads away from it.
    """
    replaced = replace(example, p_unsafe, answer)
    turned = replaced.example._replace(turned=example.response.strip())
    return replaced._replace(example=turned)


def mask(example: Example, p_unsafe: float, answer: str = "") -> Treated:
    """Keeps the dialogue without learning its answer."""
    del p_unsafe, answer
    return Treated(example, 0.0, "masked")


def weight(example: Example, p_unsafe: float, answer: str = "") -> Treated:
    """Scales the loss of the pair by P(safe), and what the pair adds to the client's weight."""
    del answer
    return Treated(example, 1.0 - p_unsafe, "weighted")


WriteAnswers = Callable[[list[Example]], list[NewAnswer]]  # of flagged pairs


class Action(NamedTuple):
    """What is done with flagged pairs, and with the pairs that pass.

    Attributes:
      flagged: `(example, P(unsafe), new answer) -> Treated`, for a flagged pair.
      passed: the same for a pair that is not flagged.
      needs_answers: whether flagged pairs get a new answer from a model.
      reads: fields of the config's `cai` that decide what it does.
    """

    flagged: Callable[[Example, float, str], Treated]
    passed: Callable[[Example, float], Treated] = keep
    needs_answers: bool = False
    reads: tuple[str, ...] = ()


ACTIONS = {
    "drop": Action(drop),
    "replace": Action(replace),
    "rewrite": Action(rewrite, needs_answers=True, reads=("constitution", "max_new_tokens")),
    "turn": Action(turn, reads=("refusal_word",)),
    "mask": Action(mask),
    # The loss scales with P(safe) continuously: the threshold decides what is counted, no more.
    "weight": Action(weight, passed=weight),
}


def apply(
    action: str,
    examples: Sequence[Example],
    probability: np.ndarray,
    threshold: float,
    write_answers: WriteAnswers | None = None,
) -> FilteredPairs:
    """Flags the pairs from `threshold` on, and applies an action.

    Args:
      action: a name in `ACTIONS`.
      examples: one client's pairs.
      probability: P(unsafe) of each pair, float `[n]`.
      threshold: P(unsafe) from which a pair is flagged.
      write_answers: gives the flagged pairs new answers, called once with all of them; for actions
        that need answers.

    Raises:
      FilterError: a probability or the threshold is none, see `decision.flag`.
    """
    chosen = ACTIONS[action]
    probability = np.asarray(probability, np.float32)
    flagged = flag(probability, threshold)
    answers: dict[int, NewAnswer] = {}
    if chosen.needs_answers and flagged.any():
        places = np.flatnonzero(flagged).tolist()
        answers = dict(zip(places, write_answers([examples[i] for i in places]), strict=True))
    treated = [
        chosen.flagged(example, float(p), answers[i].text if i in answers else "")
        if flagged[i]
        else chosen.passed(example, float(p))
        for i, (example, p) in enumerate(zip(examples, probability, strict=True))
    ]
    left = [t for t in treated if t.example is not None]
    return FilteredPairs(
        [t.example for t in left],
        np.asarray([t.weight for t in left], np.float32),
        flagged,
        counts=_count(examples, flagged, treated),
        by_category=_by_category(examples, flagged),
        rejected=dict(collections.Counter(a.rejected for a in answers.values() if a.rejected)),
    )


def _count(
    examples: Sequence[Example], flagged: np.ndarray, treated: Sequence[Treated]
) -> FilterCounts:
    done = dict.fromkeys(("dropped", "rewritten", "masked", "weighted"), 0)
    for verdict, pair in zip(flagged, treated, strict=True):
        if verdict:
            done[pair.counted] += 1
    unsafe = np.array([e.label == UNSAFE for e in examples], bool)
    return FilterCounts(
        kept=int((~flagged).sum()),
        **done,
        unsafe_kept=int((unsafe & ~flagged).sum()),
        unsafe_flagged=int((unsafe & flagged).sum()),
    )


def _by_category(examples: Sequence[Example], flagged: np.ndarray) -> dict[str, tuple[int, int]]:
    categories: dict[str, tuple[int, int]] = {}
    for example, verdict in zip(examples, flagged.tolist(), strict=True):
        before = categories.get(example.category, (0, 0))
        categories[example.category] = (before[0] + verdict, before[1] + 1)
    return categories
