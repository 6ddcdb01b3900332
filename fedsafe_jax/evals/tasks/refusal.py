"""Refusal on lists of prompts: harmful ones are to be refused, harmless ones are not.

Harmful by default are the behaviours of AdvBench (Zou et al., 2023, arXiv 2307.15043). Refusal is
never shown without over-refusal: a model that refuses everything is not safe but useless.
"""

import functools
from collections.abc import Sequence

import numpy as np

from fedsafe_jax.data import sources
from fedsafe_jax.evals import answers, statistics
from fedsafe_jax.evals.judges import HARM, REFUSAL
from fedsafe_jax.evals.task import Column, EvalOptions, Task, request_texts


def score(rows: Sequence[dict], options: EvalOptions) -> dict:
    """Returns the verdicts of every judge by item, and the first answers.

    An empty answer is no refusal.

    Returns:
      `{"refused": {spec: [bool, share of the samples, or None where the judge failed]}, "samples":
      [{"prompt", "answer"}]}`, in the order of the requests; "prompt" is the whole dialogue.
    """
    del options
    specs = list(rows[0]["verdicts"])
    refused = {spec: answers.by_item(rows, spec, "refused") for spec in specs}
    return {"refused": refused, "samples": answers.samples(rows)}


def headline(outcome: dict, options: EvalOptions) -> str:
    """Returns the spec of the judge whose verdicts give a task's figure."""
    specs = [judge.spec for judge in options.judges if judge.spec in outcome["refused"]]
    return (specs or list(outcome["refused"]))[0]


def summarise(field: str, outcomes: Sequence[dict], options: EvalOptions) -> dict:
    """Returns the rate of refusals in percent, under the name `field`, and that of every judge.

    `unjudged` counts answers on which the headline's judge failed, which count for nothing.
    """
    by_judge = {}
    for spec in outcomes[0]["refused"]:
        mean, interval = statistics.rate([o["refused"][spec] for o in outcomes])
        by_judge[spec] = {field: mean, "ci95": interval}
    spec = headline(outcomes[0], options)
    values = np.array([o["refused"][spec] for o in outcomes], float)  # None becomes NaN
    failed = int(np.isnan(values).sum())
    return (
        by_judge[spec]
        | {
            "judge": spec,
            "n": statistics.complete(values).shape[1],
            "per_seed": [
                None if mean is None else 100 * mean for mean in statistics.means_by_seed(values)
            ],
            "by_judge": by_judge,
        }
        | ({"unjudged": failed} if failed else {})
    )


def values(field: str, outcome: dict, options: EvalOptions) -> dict[str, list[bool]]:
    """Returns whether each answer refuses by the headline judge, under the name `field`."""
    return {field: outcome["refused"][headline(outcome, options)]}


ADVBENCH = Task(
    name="advbench",
    version=2,
    title="harmful prompts",
    source="advbench:advbench/harmful_behaviors.csv",
    columns=(Column("harmful refused", "safety", "up", own_title="AdvBench refused"),),
    load=sources.load,
    prompts=request_texts,
    ask=answers.ask,
    score=score,
    summarise=functools.partial(summarise, "safety"),
    values=functools.partial(values, "safety"),
    measures=(REFUSAL, HARM),
    beside="over_refusal",
)

OVER_REFUSAL = Task(
    name="over_refusal",
    version=2,
    title="harmless prompts",
    source="prompts:refusal_direction/harmless_train.json.gz",
    columns=(Column("harmless refused", "rate", "down"),),
    load=sources.load,
    prompts=request_texts,
    ask=answers.ask,
    score=score,
    summarise=functools.partial(summarise, "rate"),
    values=functools.partial(values, "rate"),
    measures=(REFUSAL,),
)
