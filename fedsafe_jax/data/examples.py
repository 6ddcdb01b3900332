"""The examples that readers yield: dialogues with an answer, comparisons of two answers, labels."""

from typing import NamedTuple

SAFE, UNSAFE, UNKNOWN = "safe", "unsafe", "unknown"


class SourceError(ValueError):
    """A data source cannot be read; the message names the file and line."""


class Example(NamedTuple):
    """One dialogue that ends in a user turn, and its answer."""

    messages: tuple[tuple[str, str], ...]  # (role, text); the last role is "user"
    response: str  # "" where the source has none
    label: str = UNKNOWN  # safety of the response in its dialogue: safe, unsafe or unknown
    source: str = ""
    user: str = ""  # who holds it, for a partition by user
    category: str = ""
    language: str = ""

    @property
    def prompt(self) -> str:
        """Text of the last user turn."""
        return self.messages[-1][1]


class Choice(NamedTuple):
    """A comparison of two answers to one dialogue (HHH)."""

    messages: tuple[tuple[str, str], ...]
    better: str
    worse: str
    category: str
