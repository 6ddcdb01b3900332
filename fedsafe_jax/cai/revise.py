"""Generate, critique, revise: the data of Constitutional AI (Bai et al., 2022, section 3)."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fedsafe_jax.cai.constitution import Principle


class Record(NamedTuple):
    """One prompt's way through the loop."""

    prompt: str
    initial: str
    principle: int
    critique: str
    revision: str
    dropped: str  # why the revision is not trained on; "" where it is


Generate = Callable[[Sequence[Sequence[tuple[str, str]]], int], tuple[list[str], np.ndarray]]


def revise(
    prompts: Sequence[str],
    principles: Sequence[Principle],
    answer: Generate,
    reviser: Generate,
    seed: Sequence[int],
) -> list[Record]:
    """Runs the three generations.

    Args:
      prompts: user requests.
      principles: one is drawn for each prompt, and asks for both critique and revision.
      answer: gives the initial answers, `(dialogues, call number) -> (texts, finished)`.
      reviser: gives critiques and revisions.
      seed: of the principle drawn, such as (seed, round).

    Returns:
      A record a prompt. Dropped are revisions that are empty, cut off, or equal to the initial answer.
    """
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(principles), size=len(prompts))
    threads = [[("user", prompt)] for prompt in prompts]
    initial, _ = answer(threads, 0)
    for thread, text, j in zip(threads, initial, drawn, strict=True):
        thread += [("assistant", text), ("user", principles[j].critique_request)]
    critiques, _ = reviser(threads, 1)
    for thread, text, j in zip(threads, critiques, drawn, strict=True):
        thread += [("assistant", text), ("user", principles[j].revision_request)]
    revisions, finished = reviser(threads, 2)
    records = []
    for i, prompt in enumerate(prompts):
        reason = ""
        if not revisions[i]:
            reason = "empty"
        elif not finished[i]:
            reason = "cut"
        elif revisions[i] == initial[i]:
            reason = "unchanged"
        records.append(
            Record(prompt, initial[i], int(drawn[i]), critiques[i], revisions[i], reason)
        )
    return records
