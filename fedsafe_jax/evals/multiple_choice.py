"""Questions with a few options, of which the likeliest is chosen: what such tasks share.

Nothing is generated, so these tasks are cheap enough to run after every round.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fedsafe_jax.data.examples import SourceError
from fedsafe_jax.data.row_fields import text_of
from fedsafe_jax.data.text_files import shorten
from fedsafe_jax.evals import scoring, statistics
from fedsafe_jax.evals.task import EvalOptions
from fedsafe_jax.inference.language_model import LanguageModel

LETTERS = "ABCD"


class Question(NamedTuple):
    """One question.

    Attributes:
      asked: the question alone, which training must not come near.
      context: the text that the options stand behind, examples and all.
      options: what is scored behind it, such as letters.
      answer: index of the right option.
      category: category of the question; "" without.
    """

    asked: str
    context: str
    options: tuple[str, ...]
    answer: int
    category: str = ""


def texts(place: str, value: object, name: str) -> list[str]:
    """Returns the options of a row as texts.

    Raises:
      SourceError: there are fewer than two, or more than four where they are lettered.
    """
    if not isinstance(value, list) or len(value) < 2:
        raise SourceError(f"{place}: '{name}' must be a list of options, found {shorten(value)}.")
    return [text_of(place, one, f"'{name}'") for one in value]


def right(place: str, value: object, options: Sequence[str]) -> int:
    """Returns the index of the right option.

    Raises:
      SourceError: the value is no index of an option.
    """
    whole = int(value) if isinstance(value, str) and value.isdecimal() else value
    if isinstance(whole, bool) or not isinstance(whole, int) or not 0 <= whole < len(options):
        raise SourceError(
            f"{place}: 'answer' must be from 0 to {len(options) - 1}, found {shorten(value)}."
        )
    return whole


def asked(questions: Sequence[Question]) -> list[str]:
    """Returns the questions alone."""
    return [question.asked for question in questions]


def run(
    encode: Callable,
    by_length: bool,
    lm: LanguageModel,
    questions: Sequence[Question],
    options: EvalOptions,
) -> dict:
    """Chooses the likeliest option of every question.

    Args:
      encode: how options stand behind a text, see `continuations`.
      by_length: whether to choose also by log-likelihood a character, lm-evaluation-harness'
        `acc_norm`; a leading blank of an option does not count.
      lm: the model, under its adapter.
      questions: the questions.
      options: sizes; `max_length` is the length of a row, and cuts no question.

    Returns:
      `{"correct": [bool or None], "chosen": [int or None], "category": [str], "cut": int}`, and
      with `by_length` "correct_by_length". None where the model diverged; "cut" counts questions
      that lost their beginning, being longer than the model's context.
    """
    scores = scoring.choices(
        lm,
        [question.context for question in questions],
        [question.options for question in questions],
        options.max_length,
        encode=encode,
    )
    chosen = scores.best()
    outcome = {
        "correct": _correct(chosen, questions),
        "chosen": chosen,
        "category": [question.category for question in questions],
        "cut": int(scores.cut.sum()),
    }
    if by_length:
        lengths = np.ones_like(scores.log_likelihood)
        for i, question in enumerate(questions):
            lengths[i, : len(question.options)] = [len(o.lstrip()) for o in question.options]
        outcome["correct_by_length"] = _correct(scores.best(lengths), questions)
    return outcome


def _correct(chosen: Sequence[int | None], questions: Sequence[Question]) -> list[bool | None]:
    pairs = zip(chosen, questions, strict=True)
    return [None if index is None else index == question.answer for index, question in pairs]


def summarise(outcomes: Sequence[dict], options: EvalOptions) -> dict:
    """Returns the accuracy in percent, in all and by category.

    Returns:
      `accuracy` is over all questions (micro), `macro` the mean of the categories', where there are
      several; `by_category`; with them `by_length`; `n`, `undefined` (a model that diverged), `cut`
      and `options_chosen`: how often the first option was chosen, the second and so on, in percent,
      as a model that always says the same letter is right now and then.
    """
    del options
    correct = np.array([o["correct"] for o in outcomes], float)  # None becomes NaN
    categories = np.array(outcomes[0]["category"])
    mean, interval = statistics.rate(correct)
    by_category = {}
    for category in sorted(set(categories) - {""}):
        part = correct[:, categories == category]
        rate, part_interval = statistics.rate(part)
        count = statistics.complete(part).shape[1]
        by_category[str(category)] = {"accuracy": rate, "ci95": part_interval, "n": count}
    known = [one["accuracy"] for one in by_category.values() if one["accuracy"] is not None]
    chosen = np.array([o["chosen"] for o in outcomes], float)
    counts = [
        int((chosen == index).sum()) for index in range(int(np.nanmax(chosen, initial=0)) + 1)
    ]
    summary = {
        "accuracy": mean,
        "ci95": interval,
        "n": statistics.complete(correct).shape[1],
        "undefined": int(np.isnan(correct).sum()),
        "cut": outcomes[0]["cut"],
        "per_seed": statistics.means_by_seed(100 * correct),
        "options_chosen": [round(100 * count / chosen.size, 1) for count in counts],
    }
    if known:
        summary |= {"macro": float(np.mean(known)), "by_category": by_category}
    if "correct_by_length" in outcomes[0]:
        rate, interval = statistics.rate([o["correct_by_length"] for o in outcomes])
        summary |= {"by_length": rate, "by_length_ci95": interval}
    return summary


def values(outcome: dict, options: EvalOptions) -> dict[str, list[bool | None]]:
    """Returns whether each question is answered right."""
    del options
    extra = outcome.get("correct_by_length")
    return {"accuracy": outcome["correct"]} | ({} if extra is None else {"by_length": extra})
