"""HHH: how often the better of two answers is the likelier one, by category.

Helpfulness, honesty, harmlessness (Askell et al., 2021, arXiv 2112.00861).
"""

from collections.abc import Sequence

import numpy as np

from fedsafe_jax.data import chat, sources
from fedsafe_jax.data.examples import Choice, Example
from fedsafe_jax.data.readers import field, parse_dialogue
from fedsafe_jax.evals import scoring, statistics
from fedsafe_jax.evals.task import Column, EvalOptions, Task, request_texts
from fedsafe_jax.inference.language_model import LanguageModel


def load_choices(location: str, data_dir: str) -> list[Choice]:
    """Reads the HHH comparisons: the 438-item file, or rows with a `category` as in BIG-bench.

    The 438-item file names no category; its items are grouped by `single turn` and `multi turn`.
    """
    choices = []
    for place, row in sources.read_rows(location, data_dir):
        better = parse_dialogue(field(place, row, "text_correct"))
        worse = parse_dialogue(field(place, row, "text_incorrect"))
        turns = sum(role == "user" for role, _ in better)
        category = row.get("category") or ("single turn" if turns == 1 else "multi turn")
        choices.append(Choice(better[:-1], better[-1][1], worse[-1][1], category))
    return choices


def fitted(lm: LanguageModel, choice: Choice, max_length: int) -> Choice:
    """Returns a choice whose dialogue is cut so that its longer answer ends within `max_length`.

    Both answers stand behind the same dialogue, and no answer is cut. The dialogue keeps a quarter
    of `max_length`: behind an answer that leaves less, the row is longer than that.
    """
    answers = (choice.better, choice.worse)
    return choice._replace(
        messages=chat.before_answers(lm.tokenizer, choice.messages, answers, max_length)
    )


def prefers_better(
    lm: LanguageModel, choices: Sequence[Choice], max_length: int
) -> list[bool | None]:
    """Returns whether the better answer has the higher mean log-likelihood a token, by choice.

    None where they are no numbers: a model that diverged does not prefer the worse answer.

    Args:
      lm: the model, under its adapter.
      choices: dialogues with two answers, see `fitted`.
      max_length: tokens of a packed row; dialogues that are longer get longer rows.
    """
    contexts = [choice.messages for choice in choices]
    answers = [(choice.better, choice.worse) for choice in choices]
    scores = scoring.choices(lm, contexts, answers, max_length)
    mean = scores.log_likelihood / scores.tokens.clip(1)
    return [bool(better > worse) if np.isfinite(better - worse) else None for better, worse in mean]


def run(lm: LanguageModel, choices: Sequence[Choice], options: EvalOptions) -> dict:
    """Returns `{"correct": [bool or None], "category": [str], "cut": int}`, a value a choice.

    "cut" counts the dialogues that were too long, and lost what `fitted` cuts.
    """
    short = [fitted(lm, choice, options.max_length) for choice in choices]
    return {
        "correct": prefers_better(lm, short, options.max_length),
        "category": [choice.category for choice in choices],
        "cut": sum(a.messages != b.messages for a, b in zip(short, choices, strict=True)),
    }


def summarise(outcomes: Sequence[dict], options: EvalOptions) -> dict:
    """Returns the accuracy in percent, in all and by category, and how many dialogues were cut.

    `undefined` counts comparisons without an outcome; `n` are those that have one in every seed.
    """
    del options
    correct = np.array([o["correct"] for o in outcomes], float)  # None becomes NaN
    categories = np.array(outcomes[0]["category"])
    mean, interval = statistics.rate(correct)
    by_category = {}
    for category in sorted(set(categories)):
        part, part_interval = statistics.rate(correct[:, categories == category])
        count = statistics.complete(correct[:, categories == category]).shape[1]
        by_category[category] = {"accuracy": part, "ci95": part_interval, "n": count}
    return {
        "accuracy": mean,
        "ci95": interval,
        "n": statistics.complete(correct).shape[1],
        "undefined": int(np.isnan(correct).sum()),
        "cut": outcomes[0].get("cut", 0),
        "per_seed": statistics.means_by_seed(100 * correct),
        "by_category": by_category,
    }


HHH = Task(
    name="hhh",
    version=2,
    title="HHH comparisons",
    source="hhh/438HHHEvaluations.jsonl",
    columns=(Column("HHH", "accuracy", "up"),),
    load=load_choices,
    prompts=lambda choices: request_texts(Example(choice.messages, "") for choice in choices),
    run=run,
    summarise=summarise,
    values=lambda outcome, options: {"accuracy": outcome["correct"]},
)
