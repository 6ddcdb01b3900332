"""Guardians: a small model in front of the large one, which answers in its place.

"SLM as Guardian: Pioneering AI Safety with Small Language Model" (Kwon et al., 2024, arXiv
2405.19795). A guardian reads the request before the large model speaks, or the answer behind it.
What it flags, it answers itself, where it was trained to (`filter.kind="guardian"`); else a refusal
stands in.
"""

import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fedsafe_jax.data import chat_template
from fedsafe_jax.data.examples import Example, Messages
from fedsafe_jax.data.refusals import REFUSAL
from fedsafe_jax.evals.judges import HARM, Tools, Verdict, make, measures
from fedsafe_jax.filters import store
from fedsafe_jax.filters.decision import flag
from fedsafe_jax.filters.guard import GuardFilter
from fedsafe_jax.filters.guard_prompts import render_pairs, verdict_ids
from fedsafe_jax.filters.kinds import FILTER_KINDS, Filter
from fedsafe_jax.filters.requests import REQUEST
from fedsafe_jax.guarding.contract import GuardError, handed_out, risk_of, without_marks
from fedsafe_jax.inference import generation

if TYPE_CHECKING:
    from fedsafe_jax.inference.language_model import LanguageModel

# `(dialogues, answers) -> whether each is flagged`, bool `[n]`; answers not given yet are "".
Flags = Callable[[Sequence[Messages], Sequence[str]], np.ndarray]


class Guardian(NamedTuple):
    """A guardian that is ready.

    Attributes:
      flags: whether requests, or answers, are flagged.
      reads_request: whether it reads the request alone, before anything is answered.
      reply: what it says itself to dialogues that were flagged.
    """

    flags: Flags
    reads_request: bool
    reply: Callable[[Sequence[Messages]], list[str]]


def refusing(dialogues: Sequence[Messages]) -> list[str]:
    """Returns the packaged refusal for each dialogue."""
    return [REFUSAL] * len(dialogues)


def load(where: str, load_model: Callable[..., "LanguageModel"]) -> Guardian:
    """Loads a guardian.

    Args:
      where: folder that `fedsafe train-filter` wrote, or a guard as judges name it,
        `guard:FOLDER`, `classifier:FOLDER`, which reads answers.
      load_model: loads a language model by path or Hub id.

    Raises:
      GuardError, JudgeError: it is neither, or measures something else than harm.
      FilterError, ModelError: it cannot be loaded.
    """
    if os.path.isfile(pathlib.Path(where) / store.NAME):
        reading = store.reads(where)
        return of_filter(store.load(where, load_model, reading), reading == REQUEST)
    check(where)
    (judge,) = make((where,), Tools(load_model))
    risk_of(judge)  # which finds that it measures something else

    def flags(dialogues: Sequence[Messages], answers: Sequence[str]) -> np.ndarray:
        # By the guard's own threshold; what it failed on is flagged.
        verdicts = judge.judge(handed_out(dialogues, answers))
        return np.array([not _is_harmless(verdict) for verdict in verdicts], bool)

    return Guardian(flags, reads_request=False, reply=refusing)


def _is_harmless(verdict: Verdict) -> bool:
    return bool(verdict.refused) and verdict.score is not None and np.isfinite(verdict.score)


def check(where: str) -> None:
    """Finds what `load` would refuse, before anything is loaded.

    Raises:
      GuardError, JudgeError: naming what is wrong.
    """
    if os.path.isfile(pathlib.Path(where) / store.NAME):
        return
    if ":" not in where:
        raise GuardError(
            f"guardian '{where}': no {store.NAME} there; give a folder that `fedsafe train-filter` "
            "wrote, or a guard that reads answers, guard:FOLDER."
        )
    if measures(where) != HARM:
        raise GuardError(f"guardian '{where}': it does not tell harm; give guard:FOLDER.")


def of_filter(safety_filter: Filter, reads_request: bool) -> Guardian:
    """Returns the guardian that a safety filter makes, by its own threshold.

    Args:
      safety_filter: the filter.
      reads_request: whether it was trained on requests alone.
    """

    def flags(dialogues: Sequence[Messages], answers: Sequence[str]) -> np.ndarray:
        said = [""] * len(dialogues) if reads_request else map(without_marks, answers)
        pairs = [Example(tuple(d), a) for d, a in zip(dialogues, said, strict=True)]
        return flag(safety_filter.score(pairs), safety_filter.decision.threshold)

    reply = refusing
    if FILTER_KINDS[safety_filter.kind].writes_answers:
        reply = functools.partial(_own_words, safety_filter)
    return Guardian(flags, reads_request, reply)


def _own_words(guardian: GuardFilter, dialogues: Sequence[Messages]) -> list[str]:
    """Returns its own answers; a refusal where one does not end in time."""
    said = replies(guardian, [Example(tuple(turns), "") for turns in dialogues])
    return [text or REFUSAL for text in said]


def replies(guardian: GuardFilter, pairs: Sequence[Example], max_new_tokens: int = 64) -> list[str]:
    """Generates a guardian's answers; "" where an answer does not end in time.

    The verdict "unsafe" is put in front, since a guardian answers behind its verdict.

    Args:
      guardian: a filter of the kind that writes answers.
      pairs: what it answers to.
      max_new_tokens: longest answer.
    """
    tokenizer = guardian.tokenizer
    lead = [verdict_ids(tokenizer)[1]]
    lead += tokenizer("\n", add_special_tokens=False)["input_ids"]
    rows = render_pairs(tokenizer, pairs, guardian.max_length, guardian.template)
    (answers,) = generation.generate_ids(
        guardian.model,
        guardian.params,
        guardian.factors,
        prompts=[[*row, *lead] for row in rows],
        stop_ids=chat_template.of(tokenizer).stop_ids,
        max_new_tokens=max_new_tokens,
        mesh=guardian.model.config.mesh,
    )
    return [
        tokenizer.decode(ids, skip_special_tokens=True).strip() if finished else ""
        for ids, finished in zip(answers.ids, answers.finished, strict=True)
    ]
