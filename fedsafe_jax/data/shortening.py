"""Dialogues that are too long: what is left out first hurts least.

Oldest turns go first, then the middle of the last request, then the end of the system prompt. The
header, the system prompt's beginning and the place of the answer stay.
"""

import bisect
from collections.abc import Callable, Sequence

ANSWERS = ("assistant", "tool")
GAP = " [...] "
LEAST = 64  # characters of a request that a long system prompt leaves room for


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

    Args:
      turns: (role, text), oldest first.
      fits: whether turns are short enough.

    Returns:
      `(turns, places)`, the turns that are left and their places in the dialogue; None where not
      even empty turns fit.
    """
    turns = list(turns)
    lead = next((i for i, (role, _) in enumerate(turns) if role != "system"), len(turns))
    starts = [i for i in range(lead + 1, len(turns)) if turns[i][0] not in ANSWERS]
    if starts:
        first = bisect.bisect_left(
            starts, True, key=lambda start: fits([*turns[:lead], *turns[start:]])
        )
        start = starts[min(first, len(starts) - 1)]
    else:
        start = lead
    places = [*range(lead), *range(start, len(turns))]
    left = [turns[i] for i in places]
    if fits(left):
        return left, places
    if len(left) == lead:  # a system prompt alone
        return None
    longest = max(range(lead, len(left)), key=lambda i: len(left[i][1]))
    # Where not even a few words of the request fit, the system prompt is too long.
    few = without_middle(left[longest][1], LEAST)
    for i in range(lead - 1, -1, -1):
        if not fits(_with(left, longest, few)):
            left = _with(left, i, _beginning(left, i, longest, fits))
    if fits(left):
        return left, places
    text = left[longest][1]
    length = _most(len(text), lambda n: fits(_with(left, longest, without_middle(text, n))))
    if length < 0:
        return None
    return _with(left, longest, without_middle(text, length)), places


def _beginning(turns: list[tuple[str, str]], place: int, request: int, fits: Callable) -> str:
    """Returns the beginning of a turn that leaves room for a few words of the request."""
    text = turns[place][1]
    turns = _with(turns, request, without_middle(turns[request][1], LEAST))
    return text[: max(0, _most(len(text), lambda n: fits(_with(turns, place, text[:n]))))]


def _with(turns: list[tuple[str, str]], place: int, text: str) -> list[tuple[str, str]]:
    return [*turns[:place], (turns[place][0], text), *turns[place + 1 :]]


def _most(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `most` that fits; -1 for none. Numbers above one that fails fail."""
    low, high = -1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
