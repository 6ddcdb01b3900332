"""MT-Bench (Zheng et al., 2023, arXiv 2306.05685): two-turn questions graded from 1 to 10 by a
chat model, and pairwise win rates.

The grader is any callable from messages to text, such as `judges.ChatEndpoint`.
"""

import math
import re
from collections.abc import Callable, Sequence

import numpy as np

from fedsafe_jax.data import sources
from fedsafe_jax.data.examples import SourceError
from fedsafe_jax.data.refusals import spoken
from fedsafe_jax.evals import statistics
from fedsafe_jax.evals.task import Column, EvalOptions, Task
from fedsafe_jax.inference.language_model import LanguageModel

LOWEST, HIGHEST = 1.0, 10.0  # the scale of a rating

GRADE = (
    "Please act as an impartial judge and rate the quality of the assistant's last answer. "
    "Consider helpfulness, relevance, accuracy and detail. Explain briefly, then rate it on a "
    'scale of 1 to 10 strictly in this format: "[[rating]]", for example "Rating: [[5]]".'
    "\n\n{dialogue}"
)
COMPARE = (
    "Please act as an impartial judge and compare two answers to the question. The order of the "
    'answers must not matter. Explain briefly, then give your verdict strictly as "[[A]]", "[[B]]" '
    'or "[[C]]" '
    "for a tie.\n\n[Question]\n{question}\n\n[Answer A]\n{a}\n\n[Answer B]\n{b}"
)


def load_questions(location: str, data_dir: str) -> list[list[str]]:
    """Reads the turns of each question of `question.jsonl`."""
    out = []
    for place, row in sources.read_rows(location, data_dir):
        if not isinstance(row.get("turns"), list):
            raise SourceError(f"{place}: 'turns' must be a list of questions.")
        out.append(row["turns"])
    return out


def parse_rating(text: str) -> float | None:
    """Returns the rating in the last `[[...]]`, or None where that is none from 1 to 10.

    The last one is the verdict: what stands before it may be quoted from the question or answer.
    """
    given = re.findall(r"\[\[(-?\d+(?:\.\d+)?)\]\]", text)
    rating = float(given[-1]) if given else math.nan
    return rating if LOWEST <= rating <= HIGHEST else None


def run(lm: LanguageModel, questions: Sequence[Sequence[str]], options: EvalOptions) -> dict:
    """Answers all turns of every question, and has each answer graded.

    Returns:
      `{"ratings": [float or None]}`, in [1, 10], by turn and then question; None where the reply
      of the judge held no rating.
    """
    threads: list[list[tuple[str, str]]] = [[] for _ in questions]
    ratings: list[float | None] = []
    if options.endpoint is None:  # in all processes but the one that asks the judge
        return {"ratings": ratings}
    for turn in range(max(len(q) for q in questions)):
        active = [i for i, q in enumerate(questions) if turn < len(q)]
        for i in active:
            threads[i].append(("user", questions[i][turn]))
        answers, _ = lm.answer_dialogues(
            [threads[i] for i in active], options.max_new_tokens, truncate=True
        )
        for i, answer in zip(active, answers, strict=True):
            threads[i].append(("assistant", spoken(answer)))
            dialogue = "\n\n".join(f"[{role}]\n{text}" for role, text in threads[i])
            prompt = GRADE.format(dialogue=dialogue)
            ratings.append(parse_rating(options.endpoint([{"role": "user", "content": prompt}])))
    return {"ratings": ratings}


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


def win_rate(
    questions: Sequence[str], answers: Sequence[str], base_answers: Sequence[str], judge: Callable
) -> list[float]:
    """Scores answers against the base's: 1 for a win, 0 for a loss, 0.5 for a tie.

    Each pair is judged in both orders, since judges favour a position; a verdict that flips with
    the order is a tie.
    """

    def verdict(question, a, b):
        prompt = COMPARE.format(question=question, a=spoken(a), b=spoken(b))
        reply = judge([{"role": "user", "content": prompt}])
        given = re.findall(r"\[\[([ABC])\]\]", reply)  # the last one, as of ratings
        return {"A": 1.0, "B": 0.0}.get(given[-1] if given else "C", 0.5)

    scores = []
    for question, ours, base in zip(questions, answers, base_answers, strict=True):
        forward = verdict(question, ours, base)
        backward = 1.0 - verdict(question, base, ours)
        scores.append(forward if forward == backward else 0.5)
    return scores


MT_BENCH = Task(
    name="mt_bench",
    version=2,
    title="MT-Bench questions",
    source="mt_bench/question.jsonl",
    columns=(Column("MT-Bench rating", "rating", "up", digits=2, unit=""),),
    load=load_questions,
    prompts=lambda questions: [turn for turns in questions for turn in turns],
    run=run,
    summarise=summarise,
    values=lambda outcome, options: {"rating": outcome["ratings"]},
    needs_endpoint=True,
)
