"""MT-Bench (Zheng et al., 2023, arXiv 2306.05685): two-turn questions, rated from 1 to 10."""

from collections.abc import Sequence

import numpy as np

from fedsafe_jax.data import chat, sources
from fedsafe_jax.data.examples import SourceError
from fedsafe_jax.data.refusals import spoken
from fedsafe_jax.evals import answers, statistics
from fedsafe_jax.evals.judges import RATING
from fedsafe_jax.evals.task import Column, EvalOptions, Task
from fedsafe_jax.inference.language_model import LanguageModel


def load_questions(location: str, data_dir: str) -> list[list[str]]:
    """Reads the turns of each question of `question.jsonl`."""
    out = []
    for place, row in sources.read_rows(location, data_dir):
        if not isinstance(row.get("turns"), list):
            raise SourceError(f"{place}: 'turns' must be a list of questions.")
        out.append(row["turns"])
    return out


def ask(lm: LanguageModel, questions: Sequence[Sequence[str]], options: EvalOptions) -> list[dict]:
    """Answers all turns of every question; rows by turn and then question."""
    threads: list[list[tuple[str, str]]] = [[] for _ in questions]
    rows: list[dict] = []
    for turn in range(max(len(q) for q in questions)):
        active = [i for i, q in enumerate(questions) if turn < len(q)]
        for i in active:
            threads[i].append(("user", questions[i][turn]))
        texts, finished = lm.answer_dialogues(
            [answers.with_system(tuple(threads[i]), options.system) for i in active],
            options.max_new_tokens,
            truncate=True,
        )
        for i, text, ended in zip(active, texts, finished, strict=True):
            row = {"item": len(rows), "question": i, "turn": turn}
            row |= {"messages": chat.to_dicts(threads[i]), "answer": text, "finished": bool(ended)}
            rows.append(row)
            threads[i].append(("assistant", spoken(text)))
    return rows


def score(rows: Sequence[dict], options: EvalOptions) -> dict:
    """Returns `{"ratings": [float or None]}`, in [1, 10], in the order of the rows; None where the
    judge's reply held no rating."""
    spec = options.judges_of(MT_BENCH)[0].spec
    return {"ratings": answers.by_item(rows, spec, "score")}


def summarise(outcomes: Sequence[dict], options: EvalOptions) -> dict:
    """Returns the mean rating over the turns that were graded in every seed.

    Returns:
      `{"rating", "ci95", "n", "unparsed"}`; `unparsed` counts replies without a rating. Rating and
      interval are None where no reply holds one.
    """
    del options
    ratings = np.array([o["ratings"] for o in outcomes], float)  # None becomes NaN
    mean, interval = statistics.mean(ratings)
    return {
        "rating": mean,
        "ci95": interval,
        "n": statistics.complete(ratings).shape[1],
        "unparsed": int(np.isnan(ratings).sum()),
    }


MT_BENCH = Task(
    name="mt_bench",
    version=2,
    title="MT-Bench questions",
    source="mt_bench/question.jsonl",
    columns=(Column("MT-Bench rating", "rating", "up", digits=2, unit=""),),
    load=load_questions,
    prompts=lambda questions: [turn for turns in questions for turn in turns],
    ask=ask,
    score=score,
    summarise=summarise,
    values=lambda outcome, options: {"rating": outcome["ratings"]},
    measures=(RATING,),
)
