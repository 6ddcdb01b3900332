"""MMLU (Hendrycks et al., 2021, arXiv 2009.03300): four options in 57 subjects.

Wording and scoring are lm-evaluation-harness 0.4's (`mmlu`, default template): the subject, the
question with lettered options, and the letter chosen by log-likelihood behind "Answer:". Five-shot
sets the first five questions of the subject's `dev` file before it, as published figures do.
"""

import functools
import pathlib

from fedsafe_jax.data import sources
from fedsafe_jax.data.examples import SourceError
from fedsafe_jax.data.row_fields import field, optional
from fedsafe_jax.evals import continuations, multiple_choice
from fedsafe_jax.evals.multiple_choice import LETTERS, Question
from fedsafe_jax.evals.task import Column, Task

SHOTS = 5
DESCRIPTION = "The following are multiple choice questions (with answers) about {subject}.\n\n"


def load(few_shot: bool, location: str, data_dir: str) -> list[Question]:
    """Reads rows of `question`, `choices` (four), `answer` (from 0 to 3) and `subject`.

    Args:
      few_shot: whether five solved questions of the subject stand before each, from the file `dev`
        beside this one, with the same ending.
      location: file below `data_dir`.
      data_dir: folder of the files.

    Raises:
      SourceError: a file is missing or a row wrong.
    """
    before: dict[str, list[str]] = {}
    if few_shot:
        path = pathlib.PurePosixPath(location)
        beside = str(path.with_name("dev" + "".join(path.suffixes)))
        for one in _questions(beside, data_dir):
            solved = f"{one.context}{one.options[one.answer]}\n\n"
            before.setdefault(one.category, []).append(solved)
    questions = []
    for one in _questions(location, data_dir):
        if few_shot and len(before.get(one.category, ())) < SHOTS:
            raise SourceError(
                f"{beside}: has no {SHOTS} questions of the subject '{one.category}'."
            )
        about = DESCRIPTION.format(subject=one.category.replace("_", " ")) if one.category else ""
        shots = "".join(before.get(one.category, ())[:SHOTS])
        questions.append(one._replace(context=about + shots + one.context))
    return questions


def _questions(location: str, data_dir: str) -> list[Question]:
    """Reads a file's questions, each without anything before it."""
    questions = []
    for place, row in sources.read_rows(location, data_dir):
        asked = field(place, row, "question")
        choices = multiple_choice.texts(place, row.get("choices"), "choices")
        if len(choices) != len(LETTERS):
            raise SourceError(f"{place}: 'choices' holds {len(choices)} options; expected four.")
        right = multiple_choice.right(place, row.get("answer"), choices)
        listed = "\n".join(f"{x}. {said}" for x, said in zip(LETTERS, choices, strict=True))
        context = f"{asked.strip()}\n{listed}\nAnswer:"
        options, subject = tuple(f" {x}" for x in LETTERS), optional(place, row, "subject")
        questions.append(Question(asked, context, options, answer=right, category=subject))
    return questions


MMLU = Task(
    name="mmlu",
    version=1,
    title="MMLU questions",
    source="mmlu/test.jsonl",
    columns=(Column("MMLU", "accuracy", "up"),),
    load=functools.partial(load, False),
    prompts=multiple_choice.asked,
    run=functools.partial(multiple_choice.run, continuations.as_one_text, False),
    summarise=multiple_choice.summarise,
    values=multiple_choice.values,
)

MMLU_FIVE_SHOT = MMLU._replace(
    name="mmlu_five_shot",
    title="MMLU questions behind five examples",
    columns=(Column("MMLU five-shot", "accuracy", "up"),),
    load=functools.partial(load, True),
)
