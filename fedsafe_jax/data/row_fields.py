"""Fields of a row as checked text; what is wrong is named with the row's place."""

from collections.abc import Collection

from fedsafe_jax.data import limits
from fedsafe_jax.data.examples import SourceError
from fedsafe_jax.data.text_files import shorten


def text_of(place: str, value: object, what: str) -> str:
    """Returns a field's value as text that can be tokenised.

    Args:
      place: place of the row, named in the error.
      value: text or a number.
      what: name of the field, such as `'content' of message 2`.

    Raises:
      SourceError: the value is neither, or holds what no tokenizer reads: NUL, or half of a
        surrogate pair; or the text is longer than `limits` allows.
    """
    if isinstance(value, bool | int | float):
        return str(value)
    if not isinstance(value, str):
        raise SourceError(f"{place}: {what} must be text, found {shorten(value)}.")
    if len(value) > limits.MOST_CHARACTERS:
        raise SourceError(
            f"{place}: {what} has {len(value):,} characters; at most {limits.MOST_CHARACTERS:,} "
            "are read: split the text, or remove the row."
        )
    if "\0" in value:
        raise SourceError(f"{place}: {what} holds a NUL character; remove it.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise SourceError(
            f"{place}: {what} holds half of a character ({value[error.start]!a}, a lone surrogate)"
            "; write the text anew as UTF-8."
        ) from None
    return value


def field(place: str, row: dict, *names: str) -> str:
    """Returns the first field of a row that is there, as text.

    Args:
      place: place of the row, named in the error.
      row: the row.
      names: names of the field, in order of preference.

    Raises:
      SourceError: the row has none of the fields, or its value is no text.
    """
    for name in names:
        if row.get(name) is not None:
            return text_of(place, row[name], repr(name))
    raise SourceError(
        f"{place}: no field {' or '.join(map(repr, names))}; found {shorten(sorted(row), 300)}."
    )


def optional(place: str, row: dict, *names: str) -> str:
    """Returns the first field that is there, as `field`, or "" where the row has none."""
    there = [name for name in names if row.get(name) is not None]
    return field(place, row, *there) if there else ""


def answer(place: str, row: dict, name: str) -> str:
    """Returns the answer of a row, "" where it is null.

    Raises:
      SourceError: the row has no such field: its answer may be under another name.
    """
    return optional(place, row, name) if name in row else field(place, row, name)


def one_of(place: str, row: dict, name: str, allowed: Collection[str]) -> str:
    """Returns a field that has one of a few values.

    Raises:
      SourceError: the field is not there, or has another value.
    """
    value = field(place, row, name)
    if value not in allowed:
        raise SourceError(
            f"{place}: {name!r} must be one of {', '.join(allowed)}, found {shorten(value)}."
        )
    return value


def ask(place: str, prompt: str) -> tuple[tuple[str, str], ...]:
    """Returns the dialogue that asks one prompt.

    Raises:
      SourceError: the prompt is blank.
    """
    if not prompt.strip():
        raise SourceError(f"{place}: the prompt is blank; give it a text or remove the row.")
    return (("user", prompt.strip()),)
