"""Dialogues that are too long: what is left out first hurts least.

Oldest turns go first, then the middle of the last request, then the end of the system prompt. The
header, the system prompt's beginning and the place of the answer stay.
"""

import bisect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWERS = ("assistant", "tool")
GAP = " [...] "
LEAST = 64  # characters of a request that a long system prompt leaves room for


def system_turns(messages: Sequence[tuple[str, str]]) -> int:
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


def beginning_of(tokenizer: "PreTrainedTokenizerBase", text: str, count: int) -> str:
    """Returns the first `count` tokens of a text, as text."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return text if len(ids) <= count else tokenizer.decode(ids[:count])


def end_of(tokenizer: "PreTrainedTokenizerBase", text: str, count: int) -> str:
    """Returns the last `count` tokens of a text, as text."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return text if len(ids) <= count else tokenizer.decode(ids[len(ids) - count :])


def without_middle(text: str, length: int) -> str:
    """Returns the beginning and the end of a text, `length` characters in all.

    >>> without_middle("The beginning and the end", 10)
    'The b [...] e end'
    """
    if length >= len(text):
        return text
    tail = length // 2
    return text[: length - tail] + GAP + text[len(text) - tail :] if length else ""


def shorten(
    turns: Sequence[tuple[str, str]],
    fits: Callable[[Sequence[tuple[str, str]]], bool],
) -> tuple[list[tuple[str, str]], list[int]] | None:
    """Leaves out of a dialogue what hurts least, until it fits.

    What is left begins, behind the system prompt, with a request: templates ask for that. Where the
    last request has answers or tools behind it, the longest of these turns lose their middle.

    Args:
      turns: (role, text), oldest first.
      fits: whether turns are short enough.

    Returns:
      `(turns, places)`, the turns that are left and their places in the dialogue; None where not
      even empty turns fit.
    """
    turns = list(turns)
    lead = system_turns(turns)
    starts = [i for i in range(lead + 1, len(turns)) if turns[i][0] not in ANSWERS]
    start = lead
    if starts and not fits(turns):
        # Fewer turns are never longer, so the oldest start that fits is found by bisection.
        first = bisect.bisect_left(
            starts, True, key=lambda start: fits([*turns[:lead], *turns[start:]])
        )
        start = starts[min(first, len(starts) - 1)]
    places = [*range(lead), *range(start, len(turns))]
    left = [turns[i] for i in places]
    if fits(left):
        return left, places
    if len(left) == lead:  # a system prompt alone
        return None
    # Where not even a few words of the request fit, the system prompt is too long.
    for i in range(lead - 1, -1, -1):
        if not fits(_at_most(left, lead, LEAST)):
            left[i] = (left[i][0], _beginning(left, i, lead, fits))
    if fits(left):
        return left, places
    longest = max(len(text) for _, text in left[lead:])
    length = _most(longest, lambda n: fits(_at_most(left, lead, n)))
    return None if length < 0 else (_at_most(left, lead, length), places)


def _beginning(turns: list[tuple[str, str]], place: int, lead: int, fits: Callable) -> str:
    """Returns the beginning of a system turn that leaves room for a few words of the request."""
    role, text = turns[place]
    few = _at_most(turns, lead, LEAST)
    most = _most(len(text), lambda n: fits([*few[:place], (role, text[:n]), *few[place + 1 :]]))
    return text[: max(0, most)]


def _at_most(turns: list[tuple[str, str]], lead: int, length: int) -> list[tuple[str, str]]:
    """Returns turns of which those behind the system prompt have `length` characters at most."""
    behind = [(role, without_middle(text, length)) for role, text in turns[lead:]]
    return [*turns[:lead], *behind]


def _most(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `most` that fits; -1 for none. Numbers above one that fails fail."""
    low, high = -1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
