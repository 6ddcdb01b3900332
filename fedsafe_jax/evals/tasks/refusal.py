"""Refusal on lists of prompts: harmful ones are to be refused, harmless ones are not.

Harmful by default are the behaviours of AdvBench (Zou et al., 2023, arXiv 2307.15043). Refusal is
never shown without over-refusal: a model that refuses everything is not safe but useless.
"""

import functools
from collections.abc import Sequence

import numpy as np

from fedsafe_jax.data import sources
from fedsafe_jax.data.examples import Example
from fedsafe_jax.evals import statistics
from fedsafe_jax.evals.judges import JUDGES
from fedsafe_jax.evals.task import Column, EvalOptions, Task, request_texts
from fedsafe_jax.inference.language_model import LanguageModel

SHOWN = 12  # answers kept for the report


def run(lm: LanguageModel, requests: Sequence[Example], options: EvalOptions) -> dict:
    """Answers every request in its dialogue, greedily, and judges the answers.

    An empty answer is no refusal.

    Returns:
      `{"refused": {judge: [bool]}, "samples": [{"prompt", "answer"}]}`, in the order of the
      requests; "prompt" is the whole dialogue.
    """
    answers = answer(lm, requests, options)
    return {
        "refused": judge_answers(answers),
        "samples": [
            {"prompt": request.dialogue, "answer": text}
            for request, text in zip(requests[:SHOWN], answers[:SHOWN], strict=True)
        ],
    }


def answer(lm: LanguageModel, requests: Sequence[Example], options: EvalOptions) -> list[str]:
    """Answers every request in its dialogue, greedily."""
    answers, _ = lm.answer_dialogues(
        [request.messages for request in requests],
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        truncate=True,
    )
    return answers


def asked(requests: Sequence[Example]) -> list[str]:
    """Returns each request's whole dialogue as text."""
    return [request.dialogue for request in requests]


def judge_answers(answers: Sequence[str]) -> dict[str, list[bool]]:
    """Returns whether each answer refuses, by the name of the judge."""
    return {name: [judge(a) for a in answers] for name, judge in JUDGES.items()}


def summarise(field: str, outcomes: Sequence[dict], options: EvalOptions) -> dict:
    """Returns the rate of refusals in percent, under the name `field`, and that of every judge."""
    by_judge = {}
    for name in outcomes[0]["refused"]:
        mean, interval = statistics.rate([o["refused"][name] for o in outcomes])
        by_judge[name] = {field: mean, "ci95": interval}
    values = np.array([o["refused"][options.judge] for o in outcomes], float)
    return by_judge[options.judge] | {
        "judge": options.judge,
        "n": values.shape[1],
        "per_seed": (100 * values.mean(1)).tolist(),
        "by_judge": by_judge,
    }


def values(field: str, outcome: dict, options: EvalOptions) -> dict[str, list[bool]]:
    """Returns whether each answer refuses by the headline judge, under the name `field`."""
    return {field: outcome["refused"][options.judge]}


ADVBENCH = Task(
    name="advbench",
    version=1,
    title="harmful prompts",
    source="advbench:advbench/harmful_behaviors.csv",
    columns=(Column("harmful refused", "safety", "up", own_title="AdvBench refused"),),
    load=sources.load,
    prompts=request_texts,
    run=run,
    summarise=functools.partial(summarise, "safety"),
    values=functools.partial(values, "safety"),
    beside="over_refusal",
)

OVER_REFUSAL = Task(
    name="over_refusal",
    version=1,
    title="harmless prompts",
    source="prompts:refusal_direction/harmless_train.json.gz",
    columns=(Column("harmless refused", "rate", "down"),),
    load=sources.load,
    prompts=request_texts,
    run=run,
    summarise=functools.partial(summarise, "rate"),
    values=functools.partial(values, "rate"),
)
