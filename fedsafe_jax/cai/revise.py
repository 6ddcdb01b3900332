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
    preferred: bool  # the revision mends the initial answer: a preference pair


Generate = Callable[[Sequence[Sequence[tuple[str, str]]], int], tuple[list[str], np.ndarray]]


def revise(
    prompts: Sequence[str],
    principles: Sequence[Principle],
    answer: Generate,
    reviser: Generate,
    seed: Sequence[int],
    wanted: Sequence[bool],
    refuses: Callable[[str], bool],
) -> list[Record]:
    """Runs the three generations.

    Args:
      prompts: user requests.
      principles: one is drawn for each prompt, and asks for both critique and revision.
      answer: gives the initial answers, `(dialogues, call number) -> (texts, finished)`.
      reviser: gives critiques and revisions.
      seed: of the principle drawn, such as (seed, round).
      wanted: whether each prompt is red-teaming, so that a refusal is wanted.
      refuses: whether a text refuses.

    Returns:
      A record a prompt. Dropped are revisions that are empty, cut off, equal to the initial answer,
      or wrong for their prompt: a revision that still complies with red-teaming, or refuses a
      harmless request. Preference pairs are those where the initial answer was wrong and the
      revision is not.
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
        elif refuses(revisions[i]) != wanted[i]:
            reason = "still harmful" if wanted[i] else "over-refusal"
        mends = not reason and refuses(initial[i]) != wanted[i]
        records.append(
            Record(prompt, initial[i], int(drawn[i]), critiques[i], revisions[i], reason, mends)
        )
    return records
