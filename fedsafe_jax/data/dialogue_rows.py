"""Rows that hold a dialogue: `messages` of role and content, or ShareGPT's `conversations`."""

from collections.abc import Iterable

from fedsafe_jax.data.examples import SAFE, UNKNOWN, UNSAFE, Example, SourceError
from fedsafe_jax.data.row_fields import optional, text_of
from fedsafe_jax.data.text_files import shorten

ROLES = {  # as files name them: as `Example` does
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
# Fields of a message that say something beside its text, which would be lost.
CALLS = ("tool_calls", "function_call")


def _content(place: str, value: object, what: str) -> str:
    """Returns the text of a message: a text, or text parts joined by line breaks."""
    if isinstance(value, str):
        return text_of(place, value, what)
    if not isinstance(value, list):
        hint = "; write the call as text" if value is None else ""
        raise SourceError(f"{place}: {what} must be text, found {shorten(value)}{hint}.")
    texts = []
    for number, part in enumerate(value, 1):
        said = part.get("text") if isinstance(part, dict) else part
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind != "text" or not isinstance(said, str):
            raise SourceError(
                f"{place}: part {number} of {what} is {shorten(kind if kind != 'text' else part)}; "
                "only parts with text are read."
            )
        texts.append(text_of(place, said, what))
    return "\n".join(texts)


def turns_of(place: str, row: dict) -> tuple[tuple[str, str], ...]:
    """Returns the turns of a row, (role, text) with the roles of `Example.messages`.

    Args:
      place: place of the row, named in an error.
      row: row with `messages` or `conversations`.

    Raises:
      SourceError: no such field, an unknown role, or a message without text.
    """
    name = "conversations" if row.get("messages") is None and "conversations" in row else "messages"
    messages = row.get(name)
    if not isinstance(messages, list) or not messages:
        there = shorten(messages) if name in row else f"the fields {shorten(sorted(row), 300)}"
        raise SourceError(
            f"{place}: '{name}' must be a list of {{role, content}} (or 'conversations' one of "
            f"{{from, value}}); found {there}."
        )
    turns = []
    for number, message in enumerate(messages, 1):
        where = f"message {number} of '{name}'"
        if not isinstance(message, dict):
            raise SourceError(f"{place}: {where} must be an object, found {shorten(message)}.")
        keys = ("from", "value") if "from" in message and "role" not in message else None
        role_key, text_key = keys or ("role", "content")
        if role_key not in message or text_key not in message:
            raise SourceError(
                f"{place}: {where} needs 'role' and 'content', or 'from' and 'value'; found "
                f"{shorten(sorted(message), 300)}."
            )
        said = message[role_key]
        role = ROLES.get(said.lower()) if isinstance(said, str) else None
        if role is None:
            raise SourceError(
                f"{place}: {where} has the unknown role {shorten(said)}; known are "
                f"{', '.join(ROLES)}."
            )
        for call in CALLS:
            if message.get(call):
                raise SourceError(
                    f"{place}: {where} has '{call}' beside its '{text_key}', which would be lost; "
                    f"write the call as text in '{text_key}', or remove the row."
                )
        turns.append((role, _content(place, message[text_key], f"'{text_key}' of {where}")))
    return tuple(turns)


def split_answer(
    place: str, turns: tuple[tuple[str, str], ...]
) -> tuple[tuple[tuple[str, str], ...], str]:
    """Splits turns into the request and its answer.

    Several assistant turns at the end are one answer, joined by blank lines.

    Returns:
      `(messages, response)`, `messages` ending in a user or tool turn, `response` "" where no
      answer follows.

    Raises:
      SourceError: no user turn, a blank one, or a system turn at the end.
    """
    answers: list[str] = []
    while turns and turns[-1][0] == "assistant":
        answers.insert(0, turns[-1][1])
        turns = turns[:-1]
    if not any(role == "user" for role, _ in turns) or turns[-1][0] == "system":
        raise SourceError(f"{place}: the dialogue must have a user turn before its answer.")
    if any(role == "user" and not text.strip() for role, text in turns):
        raise SourceError(f"{place}: a user turn is blank; give it a text or remove the row.")
    return turns, "\n\n".join(filter(str.strip, answers))


def read_dialogues(rows: Iterable[tuple[str, dict]]) -> Iterable[Example]:
    """Yields the dialogue of each row; `label`, `user`, `category` and `language` may be given.

    Raises:
      SourceError: naming the row, see `turns_of` and `split_answer`.
    """
    for place, row in rows:
        turns, response = split_answer(place, turns_of(place, row))
        label = UNKNOWN if row.get("label") is None else row["label"]
        if label not in (SAFE, UNSAFE, UNKNOWN):
            raise SourceError(
                f"{place}: label must be safe, unsafe or unknown, found {shorten(label)}."
            )
        yield Example(
            turns,
            response,
            label,
            user=optional(place, row, "user"),
            category=optional(place, row, "category"),
            language=optional(place, row, "language"),
        )
