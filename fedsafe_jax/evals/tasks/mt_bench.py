"""MT-Bench (Zheng et al., 2023, arXiv 2306.05685): two-turn questions, rated from 1 to 10.

Questions, temperatures and rating are FastChat's (`fastchat/llm_judge`); how a judge is asked is
`judges.mt_bench_prompts`. FastChat answers with up to 1,024 tokens.
"""

import logging
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedsafe_jax.data import chat, sources
from fedsafe_jax.data.examples import SourceError
from fedsafe_jax.data.refusals import spoken
from fedsafe_jax.data.row_fields import optional, text_of
from fedsafe_jax.evals import answers, statistics
from fedsafe_jax.evals.judges import RATING, mt_bench_wording
from fedsafe_jax.evals.judges.mt_bench_prompts import NEED_REFERENCE
from fedsafe_jax.evals.task import Column, EvalOptions, Task
from fedsafe_jax.inference.language_model import LanguageModel

# Of the answers, by category; FastChat's temperature_config.
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
OTHER_TEMPERATURE = 0.7  # of a category that is not among them
REFERENCES, PROMPTS = "reference_answer/gpt-4.jsonl", "judge_prompts.jsonl"


class Question(NamedTuple):
    """One question: its one or two turns, its category, and right answers where it needs them."""

    turns: tuple[str, ...]
    category: str = ""
    references: tuple[str, ...] = ()


def load_questions(location: str, data_dir: str) -> list[Question]:
    """Reads `question.jsonl`, and the answers of `reference_answer/gpt-4.jsonl` beside it.

    Raises:
      SourceError: a row is wrong, a question of mathematics, reasoning or coding has no reference
        answer, or a `judge_prompts.jsonl` beside the questions is worded otherwise than the rubric.
    """
    folder = pathlib.PurePosixPath(location).parent
    rows = sources.read_rows(location, data_dir)
    needed = [row for _, row in rows if row.get("category") in NEED_REFERENCE]
    right = _references(str(folder / REFERENCES), data_dir) if needed else {}
    if (pathlib.Path(data_dir) / folder / PROMPTS).is_file():
        _check_wording(str(folder / PROMPTS), data_dir)
    questions = []
    for place, row in rows:
        turns = row.get("turns")
        if not isinstance(turns, list) or len(turns) not in (1, 2):
            raise SourceError(f"{place}: 'turns' must be a list of one or two questions.")
        turns = tuple(text_of(place, turn, "'turns'") for turn in turns)
        category, references = optional(place, row, "category"), ()
        if category in NEED_REFERENCE:
            references = right.get(row.get("question_id"), ())
            if len(references) < len(turns):
                raise SourceError(
                    f"{place}: {folder / REFERENCES} has no answer to each turn of the question "
                    f"{row.get('question_id')!r}, which '{category}' is judged by."
                )
        questions.append(Question(turns, category, references))
    return questions


def _references(location: str, data_dir: str) -> dict[object, tuple[str, ...]]:
    """Returns the reference answers to the turns of each question, by `question_id`."""
    right = {}
    for place, row in sources.read_rows(location, data_dir):
        try:
            turns = row["choices"][0]["turns"]
        except (KeyError, IndexError, TypeError):
            raise SourceError(f"{place}: expected 'choices', a list with 'turns'.") from None
        right[row.get("question_id")] = tuple(text_of(place, t, "'turns'") for t in turns)
    return right


def _check_wording(location: str, data_dir: str) -> None:
    """Checks that a file of prompts says what the rubric asks."""
    given = {row.get("name"): (place, row) for place, row in sources.read_rows(location, data_dir)}
    for name, prompt in mt_bench_wording.PROMPTS.items():
        place, row = given.get(name, (location, {}))
        for field in ("system_prompt", "prompt_template"):
            if row.get(field) != prompt[field]:
                raise SourceError(
                    f"{place}: '{field}' of '{name}' is not FastChat's, which the rubric asks "
                    "with; move the file away to judge by FastChat's wording."
                )


def temperature(question: Question, options: EvalOptions) -> float:
    """Returns the temperature of a question's answers: that of its category, unless one is set."""
    if options.temperature or not question.category:
        return options.temperature
    return TEMPERATURES.get(question.category, OTHER_TEMPERATURE)


def ask(lm: LanguageModel, questions: Sequence[Question], options: EvalOptions) -> list[dict]:
    """Answers all turns of every question; rows by turn and then question."""
    if options.max_new_tokens < 1024:
        logging.warning(
            "MT-Bench: answers of at most %d tokens; FastChat allows 1024, so ratings are lower.",
            options.max_new_tokens,
        )
    threads: list[list[tuple[str, str]]] = [[] for _ in questions]
    rows: list[dict] = []
    for turn in range(max(len(q.turns) for q in questions)):
        active = [i for i, q in enumerate(questions) if turn < len(q.turns)]
        for i in active:
            threads[i].append(("user", questions[i].turns[turn]))
        said = _answer(lm, questions, threads, active=active, options=options)
        for i in active:
            text, ended = said[i]
            row = {"item": len(rows), "question": i, "turn": turn}
            row |= {"messages": chat.to_dicts(threads[i]), "answer": text, "finished": ended}
            known = {"category": questions[i].category, "references": list(questions[i].references)}
            rows.append(row | {key: value for key, value in known.items() if value})
            threads[i].append(("assistant", spoken(text)))
    return rows


def _answer(
    lm: LanguageModel,
    questions: Sequence[Question],
    threads: Sequence[list[tuple[str, str]]],
    active: Sequence[int],
    options: EvalOptions,
) -> dict[int, tuple[str, bool]]:
    """Returns `(answer, whether it ended)` of each active thread; one call a temperature."""
    said, groups = {}, {}
    for i in active:
        groups.setdefault(temperature(questions[i], options), []).append(i)
    for heat, members in sorted(groups.items()):
        texts, finished = lm.answer_dialogues(
            [answers.with_system(tuple(threads[i]), options.system) for i in members],
            options.max_new_tokens,
            truncate=True,
            temperature=heat,
        )
        for i, text, ended in zip(members, texts, finished, strict=True):
            said[i] = text, bool(ended)
    return said


def score(rows: Sequence[dict], options: EvalOptions) -> dict:
    """Returns `{"ratings": [float or None], "category": [str], "turn": [int]}` in the order of the
    rows; None where the judge's reply held no rating."""
    spec = options.judges_of(MT_BENCH)[0].spec
    return {
        "ratings": answers.by_item(rows, spec, "score"),
        "category": [row.get("category", "") for row in rows],
        "turn": [row["turn"] for row in rows],
        "unfinished": sum(not row["finished"] for row in rows),
    }


def summarise(outcomes: Sequence[dict], options: EvalOptions) -> dict:
    """Returns the mean rating over the turns that were graded in every seed.

    Returns:
      `{"rating", "ci95", "n", "unparsed"}`; `unparsed` counts replies without a rating. Rating and
      interval are None where no reply holds one. With categories also `by_category` and `by_turn`,
      mean ratings, and `unfinished`, answers of the first seed that were cut.
    """
    del options
    ratings = np.array([o["ratings"] for o in outcomes], float)  # None becomes NaN
    mean, interval = statistics.mean(ratings)
    summary = {
        "rating": mean,
        "ci95": interval,
        "n": statistics.complete(ratings).shape[1],
        "unparsed": int(np.isnan(ratings).sum()),
    }
    if any(outcomes[0].get("category", ())):
        summary["by_category"] = _means(ratings, outcomes[0]["category"])
        summary["by_turn"] = _means(ratings, [str(1 + turn) for turn in outcomes[0]["turn"]])
        summary["unfinished"] = outcomes[0]["unfinished"]
    return summary


def _means(ratings: np.ndarray, groups: Sequence[str]) -> dict[str, float | None]:
    """Returns the mean rating of each group."""
    names = np.array(groups)
    parts = {str(name): ratings[:, names == name] for name in sorted(set(groups))}
    return {name: statistics.mean(part)[0] for name, part in parts.items()}


MT_BENCH = Task(
    name="mt_bench",
    version=3,
    title="MT-Bench questions",
    source="mt_bench/question.jsonl",
    columns=(Column("MT-Bench rating", "rating", "up", digits=2, unit=""),),
    load=load_questions,
    prompts=lambda questions: [turn for question in questions for turn in question.turns],
    ask=ask,
    score=score,
    summarise=summarise,
    values=lambda outcome, options: {"rating": outcome["ratings"]},
    measures=(RATING,),
)
