"""Examples that readers yield: dialogues with an answer, comparisons of two answers, labels."""

from typing import NamedTuple

SAFE, UNSAFE, UNKNOWN = "safe", "unsafe", "unknown"


class SourceError(ValueError):
    """A data source cannot be read; the message names the file and line."""


class Example(NamedTuple):
    """One dialogue that ends in a user turn, and its answer."""

    messages: tuple[tuple[str, str], ...]  # (role, text); the last role is "user"
    response: str  # the answer; "" where the source has none
    label: str = UNKNOWN  # safety of the response in its dialogue: safe, unsafe or unknown
    source: str = ""  # name of the reader
    user: str = ""  # who holds the dialogue, for a partition by user
    category: str = ""  # topic, or kind of harm, as the source names it
    language: str = ""

    @property
    def prompt(self) -> str:
        """The text of the last user turn."""
        return self.messages[-1][1]


class Choice(NamedTuple):
    """A comparison of two answers to one dialogue (HHH)."""

    messages: tuple[tuple[str, str], ...]  # (role, text); the last role is "user"
    better: str  # the answer that should be preferred
    worse: str
    category: str  # harmless, helpful, honest or other
