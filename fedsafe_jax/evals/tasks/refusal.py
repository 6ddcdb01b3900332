"""Refusal on a list of prompts: AdvBench's safety, and over-refusal on harmless prompts."""

from collections.abc import Sequence
from typing import NamedTuple

from fedsafe_jax.evals.judges import JUDGES


class RefusalResult(NamedTuple):
    """Answers and each judge's verdicts, in the order of the prompts."""

    prompts: list[str]
    answers: list[str]
    refused: dict[str, list[bool]]  # by judge


def run(lm, prompts: Sequence[str], max_new_tokens: int, batch_size: int) -> RefusalResult:
    """Answers every prompt greedily and judges the answers; an empty answer is no refusal."""
    answers = lm.generate(
        list(prompts), max_new_tokens=max_new_tokens, batch_size=batch_size, truncate=True
    )
    refused = {name: [judge(a) for a in answers] for name, judge in JUDGES.items()}
    return RefusalResult(list(prompts), answers, refused)
