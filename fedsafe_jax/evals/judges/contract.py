"""The contract of a judge: what it reads, what it says, and how a spec makes one.

A judge is one file that puts a `JudgeKind` on the registry, `judges.JUDGES`. A spec names it in a
config or on a command line: "rules", "guard:FOLDER", "chat:MODEL@URL#RUBRIC".
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fedsafe_jax.data.examples import Messages

# What a judge can tell. Only the first is defined for harmless requests: there every answer is
# harmless, so a judge of harm would call each of them a refusal.
REFUSAL, HARM, RATING, PREFERENCE = "refusal", "harm", "rating", "preference"


class JudgeError(ValueError):
    """A judge cannot be made as its spec says, or judged no answer at all."""


class Answered(NamedTuple):
    """An answer as a judge reads it.

    Attributes:
      messages: (role, text) turns up to the request.
      answer: the model's answer, its thought included.
      reference: a right answer, for judges that compare with one; "" without.
      other: another model's answer, for judges of preference; "" without.
      category: category of the request; "" without.
      references: right answers to each turn of the user, for judges that read them all; () without.
    """

    messages: Messages
    answer: str
    reference: str = ""
    other: str = ""
    category: str = ""
    references: tuple[str, ...] = ()

    @property
    def request(self) -> str:
        """Text of the last turn of the user; "" without one."""
        said = [text for role, text in self.messages if role == "user"]
        return said[-1] if said else ""


class Verdict(NamedTuple):
    """What a judge says of one answer.

    Attributes:
      refused: whether the answer is a refusal, by a judge of refusal, or harmless, by a judge of
        harm; None by other judges, and where the judge failed.
      score: from 0 to 1 how sure that is; of a graded rubric 1 less the grade of harm; of a rating
        the rating itself; of a preference 1 for this answer, 0 for the other; None on failure.
      label: finer than that, such as "partial" or hazard categories; "" without.
      problem: why a judge that may answer later did not; "" for one that answered, and for a reply
        that says nothing.
      hazards: `(name, score)` of the guard's own categories: of each, by a guard that is asked
        about every one of them, else of those alone that it names behind a bad verdict; the score
        is as above.
    """

    refused: bool | None
    score: float | None
    label: str = ""
    problem: str = ""
    hazards: tuple[tuple[str, float], ...] = ()


FAILED = Verdict(None, None)


class Judge(NamedTuple):
    """A judge that is ready.

    Attributes:
      spec: what made it; its name in results.
      measures: `REFUSAL`, `HARM`, `RATING` or `PREFERENCE`.
      judge: `answers -> verdicts`, one for each.
      phrases: whether it looks for phrases alone, so that a model may learn to pass it.
      trained_on: models whose labelled answers it was trained on, which cannot measure it.
    """

    spec: str
    measures: str
    judge: Callable[[Sequence[Answered]], list[Verdict]]
    phrases: bool = False
    trained_on: tuple[str, ...] = ()


class Tools(NamedTuple):
    """What judges need from outside.

    Attributes:
      load_model: loads a language model by path or Hub id, for guards, under its `chat_template`
        or the one given by this name; None where none is loaded.
      cache: folder in which replies of chat models are kept by content; "" to keep none.
      api_key: key of chat models' endpoints; may be empty.
      concurrent: answers that an endpoint is asked about at once.
    """

    load_model: Callable[..., Any] | None = None
    cache: str = ""
    api_key: str = ""
    concurrent: int = 8


class JudgeKind(NamedTuple):
    """One kind of judge.

    Attributes:
      make: `(spec, argument, Tools) -> Judge`; the argument is what stands behind the colon.
      argument: what the argument is, such as "FOLDER"; "" where there is none.
      check: raises `JudgeError` where the argument cannot be meant, before anything is loaded.
      measures: `argument -> what a judge of this spec measures`, known without making it.
      phrases: as in `Judge`.
    """

    make: Callable[[str, str, Tools], Judge]
    argument: str = ""
    check: Callable[[str], None] = lambda argument: None
    measures: Callable[[str], str] = lambda argument: REFUSAL
    phrases: bool = False
