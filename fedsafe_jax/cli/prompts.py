"""Prompt files of commands: a text or a whole dialogue in each row."""

import collections
import pathlib
from typing import Any

from fedsafe_jax.data import sources
from fedsafe_jax.data.examples import Example, SourceError
from fedsafe_jax.data.readers import READERS


def read_prompts(path: str, column: str) -> list[Example]:
    """Reads the requests of a prompt file.

    Args:
      path: a txt, JSON, JSONL or CSV file.
      column: column or field that holds a text, or a list of {role, content}, which is a dialogue;
        an answer at its end is not read.

    Raises:
      SourceError: the file cannot be read, or a row holds no request; the message names the row.
    """
    file = pathlib.Path(path)
    rows = sources.read_rows(file.name, str(file.parent))
    return [_request(place, row, column) for place, row in rows]


def _request(place: str, row: dict, column: str) -> Example:
    if column not in row:
        raise SourceError(
            f"{place}: no column '{column}'; found {sorted(map(str, row))}. Set --column."
        )
    value: Any = row[column]
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        (request,) = READERS["chat"]([(place, {"messages": value})])
        if not any(text.strip() for role, text in request.messages if role == "user"):
            raise SourceError(f"{place}: the user's turns in column '{column}' are blank.")
        return request._replace(response="", source=place)
    if not isinstance(value, str):
        raise SourceError(
            f"{place}: column '{column}' holds {value!r:.60}; expected a text, or a list of "
            "{role, content}."
        )
    if not value.strip():
        raise SourceError(
            f"{place}: column '{column}' is blank; write a prompt, or remove the row."
        )
    return Example((("user", value),), "", source=place)


def repeats(requests: list[Example]) -> str:
    """Returns a line that says how many requests are there more than once; "" where none is."""
    times = collections.Counter(request.messages for request in requests)
    repeated = sum(count - 1 for count in times.values())
    if not repeated:
        return ""
    return (
        f"note: {repeated} of {len(requests)} prompts are repeats of earlier rows; all are asked "
        "and counted."
    )
