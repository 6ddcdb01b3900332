"""Dialogues that are too long, cut where it hurts least: the oldest turns go first."""

import bisect
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = tuple[tuple[str, str], ...]  # (role, text) turns
SHORTEST = 8  # tokens of a turn below which nothing more is cut from it


def system_turns(messages: Messages) -> int:
    """Returns how many turns at the front are the system's."""
    return next((i for i, (role, _) in enumerate(messages) if role != "system"), len(messages))


def shares(front: int, rest: int, room: int) -> tuple[int, int]:
    """Returns how much is kept of two parts: half of the room each, and what the other leaves.

    Args:
      front, rest: tokens of the parts.
      room: tokens of both together.
    """
    front = min(front, max(room // 2, room - rest))
    return front, min(rest, room - front)


def end_of(tokenizer: "PreTrainedTokenizerBase", text: str, count: int) -> str:
    """Returns the last `count` tokens of a text, as text."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return text if len(ids) <= count else tokenizer.decode(ids[len(ids) - count :])


def beginning_of(tokenizer: "PreTrainedTokenizerBase", text: str, count: int) -> str:
    """Returns the first `count` tokens of a text, as text."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return text if len(ids) <= count else tokenizer.decode(ids[:count])


def fit(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Messages,
    length: Callable[[Messages], int],
    room: int,
) -> Messages:
    """Cuts a dialogue until it fits.

    What is left begins, behind the system prompt, with a turn of the user: templates ask for that.
    Where the last request with the system prompt is too long still, the longest turn loses tokens:
    the system prompt its end, any other turn its beginning. Headers of a template are never cut.

    Args:
      tokenizer: Hugging Face tokenizer that the tokens are counted with.
      messages: (role, text) turns up to the request.
      length: tokens of a dialogue in its template, with whatever stands behind it.
      room: most tokens.

    Returns:
      The turns that are left; `messages` itself where nothing had to be cut. It may be longer than
      `room` where the template alone is.
    """
    if length(messages) <= room:
        return messages
    count = system_turns(messages)
    system, turns = messages[:count], messages[count:]
    starts = [i for i, (role, _) in enumerate(turns) if role == "user" and i]
    # Fewer turns are never longer, so the oldest start that fits is found by bisection.
    first = bisect.bisect_left(
        starts, True, key=lambda start: length((*system, *turns[start:])) <= room
    )
    if first < len(starts):
        return (*system, *turns[starts[first] :])
    return _shortened(
        tokenizer, (*system, *(turns[starts[-1] :] if starts else turns)), length, room
    )


def _shortened(tokenizer, messages: Messages, length: Callable, room: int) -> Messages:
    """Cuts the longest turn, again and again, until the dialogue fits."""
    sizes = [len(tokenizer(t, add_special_tokens=False)["input_ids"]) for _, t in messages]
    left, sizes = list(messages), list(sizes)
    while (excess := length(tuple(left)) - room) > 0 and max(sizes) > SHORTEST:
        longest = max(range(len(sizes)), key=sizes.__getitem__)
        # At most down to half at once, so that two long turns end about equally long.
        sizes[longest] = max(sizes[longest] - excess, sizes[longest] // 2, SHORTEST)
        role, text = messages[longest]
        keep = beginning_of if role == "system" else end_of
        left[longest] = (role, keep(tokenizer, text, sizes[longest]))
    return tuple(left)
