"""Judges of answers, one file each. `JUDGES` is their registry; `make` builds one by its spec."""

from collections.abc import Sequence

from fedsafe_jax.data.examples import Messages
from fedsafe_jax.evals.judges.chat import CHAT
from fedsafe_jax.evals.judges.classifier import CLASSIFIER
from fedsafe_jax.evals.judges.contract import (
    FAILED,
    HARM,
    PREFERENCE,
    RATING,
    REFUSAL,
    Answered,
    Judge,
    JudgeError,
    JudgeKind,
    Tools,
    Verdict,
)
from fedsafe_jax.evals.judges.guard import GUARD
from fedsafe_jax.evals.judges.phrases import KEYWORD, START
from fedsafe_jax.evals.judges.rules import RULES
from fedsafe_jax.filters.pairs import Refuses
from fedsafe_jax.registry import unknown

__all__ = [
    "DEFAULT",
    "EXAMPLES",
    "FAILED",
    "HARM",
    "JUDGES",
    "PREFERENCE",
    "RATING",
    "REFUSAL",
    "Answered",
    "Judge",
    "JudgeError",
    "JudgeKind",
    "Tools",
    "Verdict",
    "forms",
    "make",
    "measures",
    "parse",
    "refuses",
]

JUDGES: dict[str, JudgeKind] = {
    "rules": RULES,
    "start": START,
    "keyword": KEYWORD,
    "classifier": CLASSIFIER,
    "guard": GUARD,
    "chat": CHAT,
}


def parse(spec: str) -> tuple[JudgeKind, str]:
    """Returns the kind and the argument of a spec, such as "rules" or "guard:FOLDER".

    Raises:
      JudgeError: there is no such kind, or its argument is missing or wrong.
    """
    name, colon, argument = str(spec).partition(":")
    if name not in JUDGES:
        raise JudgeError(f"{unknown('judge', name, JUDGES)} Write {', '.join(forms())}.")
    kind = JUDGES[name]
    if kind.argument and not argument:
        raise JudgeError(f"judge '{spec}': write {name}:{kind.argument}.")
    if colon and not kind.argument:
        raise JudgeError(f"judge '{spec}': '{name}' takes nothing behind a colon.")
    if kind.argument:
        kind.check(argument)
    return kind, argument


def forms() -> list[str]:
    """Returns how every judge is written, such as "rules" and "guard:FOLDER"."""
    return [f"{name}:{kind.argument}" if kind.argument else name for name, kind in JUDGES.items()]


def measures(spec: str) -> str:
    """Returns what the judge of a spec measures, without making it; raises as `parse`."""
    kind, argument = parse(spec)
    return kind.measures(argument)


def make(specs: Sequence[str], tools: Tools | None = None) -> tuple[Judge, ...]:
    """Makes judges by their specs.

    Args:
      specs: specs of judges; the first one's verdicts are the headline.
      tools: what judges need from outside; None for nothing.

    Raises:
      JudgeError: a spec is wrong or there twice.
    """
    repeated = [spec for spec in specs if list(specs).count(spec) > 1]
    if repeated:
        raise JudgeError(f"judge '{repeated[0]}' is there twice.")
    parsed = [parse(spec) for spec in specs]
    return tuple(
        kind.make(spec, argument, tools or Tools())
        for spec, (kind, argument) in zip(specs, parsed, strict=True)
    )


def refuses(spec: str, tools: Tools | None = None) -> Refuses:
    """Returns `(dialogues, answers) -> whether each answer refuses`, by the judge of a spec.

    For what selects data: an answer on which the judge fails counts as no refusal, so that nothing
    is taken for safe that was not read.

    Raises:
      JudgeError: as `make`, or the judge does not measure refusal.
    """
    (judge,) = make((spec,), tools)
    if judge.measures != REFUSAL:
        raise JudgeError(f"judge '{spec}' does not tell refusals; use {EXAMPLES[REFUSAL]}.")

    def told(dialogues: Sequence[Messages], answers: Sequence[str]) -> list[bool]:
        asked = [Answered(tuple(d), a) for d, a in zip(dialogues, answers, strict=True)]
        return [bool(verdict.refused) for verdict in judge.judge(asked)]

    return told


DEFAULT = ("rules", "start", "keyword")
# A spec of each kind of measure, for messages.
EXAMPLES = {
    REFUSAL: "rules",
    HARM: "guard:FOLDER",
    RATING: "chat:MODEL@URL#mt_bench",
    PREFERENCE: "chat:MODEL@URL#compare",
}
