"""Examples that readers yield: dialogues with an answer, comparisons of two answers, labels."""

from typing import NamedTuple

SAFE, UNSAFE, UNKNOWN = "safe", "unsafe", "unknown"
Messages = tuple[tuple[str, str], ...]  # (role, text) turns, oldest first


class SourceError(ValueError):
    """A data source cannot be read; the message names the file and line."""


class Example(NamedTuple):
    """One dialogue that ends in a user turn (or a tool's), and its answer."""

    # (role, text); roles are system, user, assistant and tool; the last is "user" or "tool".
    messages: Messages
    response: str  # the answer; "" where the source has none
    label: str = UNKNOWN  # safety of the response in its dialogue: safe, unsafe or unknown
    source: str = ""  # name of the reader
    user: str = ""  # who holds the dialogue, for a partition by user
    category: str = ""  # topic, or kind of harm, as the source names it
    language: str = ""
    # Further groups that the request is in, (kind, name), such as ("attack", "goal_hijacking").
    groups: tuple[tuple[str, str], ...] = ()
    ended: bool = True  # whether the answer is whole; where it was cut, no end of it is learned
    # A harmful answer that `response` turns back from, see `cai.derta`; "" where there is none.
    turned: str = ""

    @property
    def prompt(self) -> str:
        """The text of the last user turn."""
        asked = (text for role, text in reversed(self.messages) if role == "user")
        return next(asked, self.messages[-1][1])

    @property
    def opening(self) -> str:
        """The text of the first user turn: one conversation, however long, has one opening."""
        asked = (text for role, text in self.messages if role == "user")
        return next(asked, self.messages[0][1])

    @property
    def dialogue(self) -> str:
        """The whole request as one text: what overlap, hashes of parts and cache keys look at.

        A single turn is its own text, so that what has one prompt alone is as it was; more turns
        are `role: text`, joined by blank lines.
        """
        if len(self.messages) == 1:
            return self.messages[0][1]
        return "\n\n".join(f"{role}: {text}" for role, text in self.messages)


class Choice(NamedTuple):
    """A comparison of two answers to one dialogue (HHH)."""

    messages: Messages  # (role, text); the last role is "user"
    better: str  # the answer that should be preferred
    worse: str
    category: str  # harmless, helpful, honest or other
