"""Answers that humans have labelled, with the model that gave them: what judges are measured on.

A source is written `MODEL=FORM:LOCATION`, such as `llama2=xstest:labels.csv`. `MODEL=` may be left
out where the rows name their models; the location is that of any source (see `sources`).
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from fedsafe_jax.data import sources
from fedsafe_jax.data.dialogue_rows import turns_of
from fedsafe_jax.data.examples import Messages, SourceError
from fedsafe_jax.data.row_fields import answer, ask, field, one_of, optional
from fedsafe_jax.data.text_files import shorten
from fedsafe_jax.registry import unknown

COMPLIANCE, PARTIAL, REFUSAL = "compliance", "partial", "refusal"
_XSTEST = {
    "1_full_compliance": COMPLIANCE,
    "2_full_refusal": REFUSAL,
    "3_partial_refusal": PARTIAL,
}
# The six actions of Do-Not-Answer (Wang et al., 2023, arXiv 2308.13387) by their number; an answer
# is harmful where it follows the instruction, and harmless by the other five.
ACTIONS = ("refuses", "refutes", "discusses", "cautions", "cannot_know", "follows")
_NUMBERS = tuple(f"{number}{zero}" for number in range(6) for zero in ("", ".0"))
_ENDING = "_action"


class LabelledAnswer(NamedTuple):
    """An answer with a human's label.

    Attributes:
      messages: (role, text) turns up to the request.
      answer: the answer.
      label: name of the class, such as "partial".
      model: who answered.
      place: file and row, to name in an error.
    """

    messages: Messages
    answer: str
    label: str
    model: str
    place: str


Rows = Iterable[tuple[str, dict]]


def _xstest(rows: Rows, model: str) -> Iterator[LabelledAnswer]:
    """Yields XSTest's completions (Röttger et al., 2024, arXiv 2308.01263) by their final label."""
    for place, row in rows:
        label = _XSTEST[one_of(place, row, "final_label", tuple(_XSTEST))]
        said = answer(place, row, "completion").strip()
        asked = ask(place, field(place, row, "prompt"))
        yield LabelledAnswer(asked, said, label, model=model, place=place)


def _do_not_answer(rows: Rows, model: str) -> Iterator[LabelledAnswer]:
    """Yields Do-Not-Answer's responses by their action, from 0 to 5.

    A row holds `question` and for each model `MODEL_response` and `MODEL_action`; where the source
    names a model, that one's alone are read.
    """
    for place, row in rows:
        asked = ask(place, field(place, row, "question"))
        models = [name.removesuffix(_ENDING) for name in row if (name or "").endswith(_ENDING)]
        models = [one for one in models if model in ("", one)]
        if not models:
            raise SourceError(
                f"{place}: no field '{model or 'MODEL'}{_ENDING}'; found {shorten(list(row), 300)}."
            )
        for one in models:
            number = one_of(place, row, f"{one}{_ENDING}", _NUMBERS)
            said = answer(place, row, f"{one}_response").strip()
            yield LabelledAnswer(asked, said, ACTIONS[int(number[0])], model=one, place=place)


def _answers(rows: Rows, model: str) -> Iterator[LabelledAnswer]:
    """Yields rows of `messages` or `prompt`, `answer`, `label` and perhaps `model`."""
    for place, row in rows:
        if row.get("messages") is None:
            asked = ask(place, field(place, row, "prompt"))
        else:
            asked = turns_of(place, row)
        label = field(place, row, "label")
        who = optional(place, row, "model") or model
        yield LabelledAnswer(asked, answer(place, row, "answer"), label, model=who, place=place)


FORMS: dict[str, Callable[[Rows, str], Iterable[LabelledAnswer]]] = {
    "xstest": _xstest,
    "do_not_answer": _do_not_answer,
    "answers": _answers,
}


def parse(source: str) -> tuple[str, str, str]:
    """Returns model ("" without), form and location of a source.

    Raises:
      SourceError: it is not written as one.
    """
    match = re.fullmatch(r"(?:([^=:]+)=)?([a-z_]+):(.+)", str(source))
    if match is None:
        raise SourceError(
            f"labelled answers {str(source)!r}: write MODEL=FORM:LOCATION, such as "
            "'llama2=xstest:labels.csv'."
        )
    model, form, location = match.groups()
    if form not in FORMS:
        raise SourceError(unknown(f"labelled answers {source!r}: form", form, FORMS))
    return model or "", form, location


def read(source: str, data_dir: str) -> list[LabelledAnswer]:
    """Reads the labelled answers of a source.

    Args:
      source: `MODEL=FORM:LOCATION`.
      data_dir: folder that locations are relative to, or "hub".

    Raises:
      SourceError: the source cannot be read, or a row does not say who answered.
    """
    model, form, location = parse(source)
    rows = list(FORMS[form](sources.read_rows(location, data_dir), model))
    for row in rows:
        if not row.model:
            raise SourceError(
                f"{row.place}: no model is named; write the source as MODEL={form}:{location}."
            )
    return rows
