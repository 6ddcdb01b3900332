"""ARC (Clark et al., 2018, arXiv 1803.05457): science questions for school, easy and hard.

Wording and scoring are lm-evaluation-harness 0.4's (`arc_easy`, `arc_challenge`, version 1.0, no
examples): the options' texts behind "Answer:", chosen by log-likelihood (`acc`), and by
log-likelihood a character (`acc_norm`).
"""

import functools

from fedsafe_jax.data import sources
from fedsafe_jax.data.examples import SourceError
from fedsafe_jax.data.row_fields import field
from fedsafe_jax.data.text_files import shorten
from fedsafe_jax.evals import continuations, multiple_choice
from fedsafe_jax.evals.multiple_choice import Question
from fedsafe_jax.evals.task import Column, Task


def load(location: str, data_dir: str) -> list[Question]:
    """Reads AI2's JSON lines, or the rows of the Hub's copy.

    AI2's rows hold `question.stem` and `question.choices`, a list of text and label; the Hub's
    `question` and `choices`, lists of text and of label. Both hold `answerKey`, a label.

    Raises:
      SourceError: the file is missing or a row wrong.
    """
    questions = []
    for place, row in sources.read_rows(location, data_dir):
        nested = row.get("question")
        holder, name = (nested, "stem") if isinstance(nested, dict) else (row, "question")
        asked, choices = field(place, holder, name), holder.get("choices")
        if isinstance(choices, list) and all(isinstance(one, dict) for one in choices):
            choices = {key: [one.get(key) for one in choices] for key in ("text", "label")}
        if not isinstance(choices, dict):
            raise SourceError(f"{place}: 'choices' must hold text and label of each option.")
        options = multiple_choice.texts(place, choices.get("text"), "text")
        labels = multiple_choice.texts(place, choices.get("label"), "label")
        key = field(place, row, "answerKey")
        if len(labels) != len(options) or key not in labels:
            raise SourceError(
                f"{place}: 'answerKey' {key!r} must be one of the {len(options)} options' labels, "
                f"found {shorten(labels)}."
            )
        context = f"Question: {asked}\nAnswer:"
        behind = tuple(f" {option}" for option in options)
        questions.append(Question(asked, context, behind, answer=labels.index(key)))
    return questions


def _task(name: str, title: str, source: str) -> Task:
    return Task(
        name=name,
        version=1,
        title=f"{title} questions",
        source=source,
        columns=(
            Column(title, "accuracy", "up"),
            Column(f"{title} by length", "by_length", "up", interval="by_length_ci95"),
        ),
        load=load,
        prompts=multiple_choice.asked,
        run=functools.partial(multiple_choice.run, continuations.as_one_text, True),
        summarise=multiple_choice.summarise,
        values=multiple_choice.values,
    )


ARC_EASY = _task("arc_easy", "ARC-Easy", "arc/ARC-Easy-Test.jsonl")
ARC_CHALLENGE = _task("arc_challenge", "ARC-Challenge", "arc/ARC-Challenge-Test.jsonl")
