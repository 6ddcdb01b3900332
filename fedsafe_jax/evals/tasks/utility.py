"""Utility: the loss of held-out harmless answers, and how often a judge prefers the model's own.

The loss needs no judge. With a judge of preference and a base model, the answers of both are
compared.
"""

from collections.abc import Sequence

import numpy as np

from fedsafe_jax.data import chat, dialogue_notes, sources
from fedsafe_jax.data.examples import Example, SourceError
from fedsafe_jax.evals import answers, scoring, statistics
from fedsafe_jax.evals.judges import PREFERENCE
from fedsafe_jax.evals.task import HELDOUT, Column, EvalOptions, Task, request_texts
from fedsafe_jax.inference.language_model import LanguageModel


def load(source: str, data_dir: str) -> list[Example]:
    """Returns the examples of a source that have an answer.

    Raises:
      SourceError: none has one.
    """
    examples = [e for e in sources.load(source, data_dir) if e.response]
    if not examples:
        raise SourceError(f"{source}: no example has an answer, whose loss is measured.")
    return examples


def answer_nll(lm: LanguageModel, examples: Sequence[Example], max_length: int) -> np.ndarray:
    """Returns the negative log-likelihood a token, in nats, of each answer, float64 `[n]`.

    NaN where nothing of the answer is left within `max_length`.
    """
    encoded = [chat.encode(lm.tokenizer, x.messages, x.response, max_length) for x in examples]
    dialogue_notes.warn(encoded, "held-out pairs")
    nll = np.full(len(encoded), np.nan)
    if kept := [i for i, one in enumerate(encoded) if one is not None]:
        totals, counts = scoring.score_examples(lm, [encoded[i] for i in kept], max_length)
        nll[kept] = -totals / counts.clip(1)
    return nll


def run(lm: LanguageModel, examples: Sequence[Example], options: EvalOptions) -> dict:
    """Returns `{"nll": [float]}`, the loss of each held-out answer."""
    return {"nll": answer_nll(lm, examples, options.max_length).tolist()}


def ask(lm: LanguageModel, examples: Sequence[Example], options: EvalOptions) -> list[dict]:
    """Returns the model's own answers, each beside the base model's as `other`; [] without one."""
    if options.base is None:
        return []
    ours, theirs = (answers.ask(model, examples, options) for model in (lm, options.base))
    return [row | {"other": other["answer"]} for row, other in zip(ours, theirs, strict=True)]


def score(rows: Sequence[dict], options: EvalOptions) -> dict:
    """Returns `{"wins": [1 for a win, 0 for a loss, 0.5 for a tie]}`; {} without comparisons."""
    if not rows:
        return {}
    spec = options.judges_of(UTILITY)[0].spec
    return {"wins": answers.by_item(rows, spec, "score")}


def summarise(outcomes: Sequence[dict], options: EvalOptions) -> dict:
    """Returns the mean loss in nats a token, and the win rate in percent where there is one.

    `undefined` counts losses that are no number: those of a model that diverged, and of answers of
    which nothing is left within `eval.max_length`.
    """
    del options
    values = np.array([o["nll"] for o in outcomes], float)
    mean, interval = statistics.mean(values)
    summary = {
        "nll": mean,
        "ci95": interval,
        "n": statistics.complete(values).shape[1],
        "undefined": int((~np.isfinite(values)).sum()),
        "per_seed": statistics.means_by_seed(values),
    }
    if "wins" in outcomes[0]:
        rate, interval = statistics.rate([o["wins"] for o in outcomes])
        summary |= {"win_rate": rate, "win_rate_ci95": interval}
    return summary


def values(outcome: dict, options: EvalOptions) -> dict[str, list[float]]:
    """Returns the loss of each answer, and the score against the base's where there is one."""
    del options
    wins = {"win_rate": outcome["wins"]} if "wins" in outcome else {}
    return {"nll": outcome["nll"]} | wins


UTILITY = Task(
    name="utility",
    version=2,
    title="held-out answers",
    source=HELDOUT,
    columns=(
        Column("benign loss", "nll", "down", digits=3, unit=""),
        Column("win rate", "win_rate", "up", interval="win_rate_ci95"),
    ),
    load=load,
    prompts=request_texts,
    run=run,
    ask=ask,
    score=score,
    summarise=summarise,
    values=values,
    measures=(PREFERENCE,),
    optional=True,
)
