"""What had to be done to dialogues to fit a chat template and a row, counted and said."""

import collections
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

# What may have to be done to a dialogue, by how it is said.
MERGED = "turns merged, as the chat template refuses their roles or order"
CONTROL = "control tokens in messages written as plain text"
CUT = "cut: oldest turns first, then the middle of the request"
NAMES = {MERGED: "merged", CONTROL: "control_tokens", CUT: "cut"}  # in results and metrics
LOST = "their template alone fills the row, or their thought never ends"


class Noted(Protocol):
    """What became of a dialogue, with what had to be done to it."""

    notes: tuple[str, ...]


def count(done: Iterable[Noted | None]) -> dict[str, int]:
    """Returns how many dialogues each note is of, by its name in `NAMES`; none that is 0.

    Args:
      done: what became of dialogues, None for a lost one.
    """
    counts = collections.Counter(note for one in done if one is not None for note in one.notes)
    return {name: counts[note] for note, name in NAMES.items() if counts[note]}


def describe(notes: Mapping[str, int], of: int, what: str) -> list[str]:
    """Returns a line for each note.

    Args:
      notes: see `count`.
      of: number of the dialogues.
      what: what they are, such as "pairs".
    """
    return [
        f"{notes[name]} of {of} {what}: {said}" for said, name in NAMES.items() if name in notes
    ]


def warn(done: Sequence[Noted | None], what: str) -> None:
    """Logs what was done to dialogues, and how many are lost.

    Args:
      done: what became of them, None for a lost one.
      what: what they are, such as "prompts".
    """
    for line in describe(count(done), len(done), what):
        logging.warning("%s", line)
    if lost := sum(one is None for one in done):
        logging.warning("%d of %d %s lost: %s", lost, len(done), what, LOST)
