"""Answers beside reference answers: token F1 and exact match, normalised as SQuAD does.

The loss of a held-out answer hardly moves when behaviour collapses; what a model says does.
"""

from collections.abc import Sequence

from fedsafe_jax.data.refusals import spoken
from fedsafe_jax.evals import answers, normalised, statistics
from fedsafe_jax.evals.task import HELDOUT, Column, EvalOptions, Task, request_texts
from fedsafe_jax.evals.tasks import utility


def score(rows: Sequence[dict], options: EvalOptions) -> dict:
    """Returns token F1 and exact match of each item, the means over its samples, and samples.

    Returns:
      `{"f1": [from 0 to 1], "exact": [from 0 to 1], "unfinished": int, "samples": [...]}`;
      `unfinished` counts answers that were cut at `max_new_tokens`.
    """
    del options
    f1: dict[int, list[float]] = {}
    exact: dict[int, list[float]] = {}
    for row in rows:
        said = spoken(row["answer"])
        f1.setdefault(row["item"], []).append(normalised.f1(said, row["reference"]))
        exact.setdefault(row["item"], []).append(float(normalised.exact(said, row["reference"])))
    return {
        "f1": [sum(f1[i]) / len(f1[i]) for i in sorted(f1)],
        "exact": [sum(exact[i]) / len(exact[i]) for i in sorted(exact)],
        "unfinished": sum(not row["finished"] for row in rows),
        "samples": answers.samples(rows),
    }


def summarise(outcomes: Sequence[dict], options: EvalOptions) -> dict:
    """Returns token F1 and exact match, in percent, and how many answers of a seed were cut."""
    del options
    f1, f1_interval = statistics.rate([o["f1"] for o in outcomes])
    exact, exact_interval = statistics.rate([o["exact"] for o in outcomes])
    return {
        "f1": f1,
        "ci95": f1_interval,
        "exact": exact,
        "exact_ci95": exact_interval,
        "n": len(outcomes[0]["f1"]),
        "unfinished": outcomes[0]["unfinished"],
    }


def values(outcome: dict, options: EvalOptions) -> dict[str, list[float]]:
    """Returns token F1 and exact match of each item."""
    del options
    return {"f1": outcome["f1"], "exact": outcome["exact"]}


TOKEN_F1 = Task(
    name="token_f1",
    version=1,
    title="reference answers",
    source=HELDOUT,
    columns=(
        Column("token F1", "f1", "up"),
        Column("exact match", "exact", "up", interval="exact_ci95"),
    ),
    load=utility.load,
    prompts=request_texts,
    ask=answers.ask,
    score=score,
    summarise=summarise,
    values=values,
)

EXERCISES = TOKEN_F1._replace(
    name="exercises",
    title="exercises",
    source="chat:package/exercises.jsonl",
    columns=(
        Column("exercises", "exact", "up", interval="exact_ci95"),
        Column("exercises' token F1", "f1", "up"),
    ),
)
