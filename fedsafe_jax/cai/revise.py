"""Generate, critique, revise: the data of Constitutional AI.

The loop is that of Bai et al. (2022, arXiv 2212.08073, section 3).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fedsafe_jax.cai.constitution import Constitution, Principle
from fedsafe_jax.cai.forms import clean
from fedsafe_jax.data import chat
from fedsafe_jax.data.examples import Example, Messages
from fedsafe_jax.data.shortening import system_turns
from fedsafe_jax.filters.decision import flag
from fedsafe_jax.random_streams import Purpose, generator

# Small models repeat the critique where the revision is asked for.
CRITIQUE = re.compile(
    r"\W*(the|this) (\w+ ){0,2}response (is|was|does|has|contain|encourage|could|may|should|seem)",
    re.IGNORECASE,
)


class Record(NamedTuple):
    """Record of one prompt's way through the loop.

    Attributes:
      prompt, initial: the request, which is the last turn of the user, and the first answer.
      principle, critique, revision: index of the principle and the texts of the last round of
        revision.
      earlier: `(principle, critique, revision)` of each round before the last.
      dropped: why the revision is not trained on; "" where it is.
      preferred: whether the revision mends the initial answer, which makes a preference pair.
      messages: all (role, text) turns before the answer; () where the prompt is all.
      replaced: why a refusal of the constitution's stands as the revision; "" where it is the
        reviser's own, which else is the last of `earlier`.
    """

    prompt: str
    initial: str
    principle: int
    critique: str
    revision: str
    earlier: tuple[tuple[int, str, str], ...]
    dropped: str
    preferred: bool
    messages: Messages = ()
    replaced: str = ""

    @property
    def turns(self) -> Messages:
        """The dialogue that was answered: system prompt, earlier turns and request."""
        return self.messages or (("user", self.prompt),)


def to_row(record: Record) -> dict:
    """Returns a record as JSON holds it, without `messages` where the prompt is all."""
    row = record._asdict()
    del row["messages"]
    return row | ({"messages": chat.to_dicts(record.messages)} if record.messages else {})


def from_row(row: Mapping) -> Record:
    """Returns the record that `to_row` wrote.

    Raises:
      KeyError: a field of the record is missing.
    """
    fields = {name: row[name] for name in Record._fields if name not in ("messages", "replaced")}
    fields["replaced"] = row.get("replaced", "")  # earlier versions had no such field
    turns = tuple((turn["role"], turn["content"]) for turn in row.get("messages", ()))
    return Record(**fields, messages=turns)


Threads = Sequence[Sequence[tuple[str, str]]]  # (role, text) turns by prompt
# `(threads, call number) -> (texts, whether each ended, bool [threads])`
Generate = Callable[[Threads, int], tuple[list[str], np.ndarray]]


class Rules(NamedTuple):
    """Check by the form of answers: red-teaming is refused, harmless requests are not.

    Attributes:
      wanted: bool `[prompts]`, whether a refusal is wanted: True for red-teaming.
      refuses: `(dialogues, answers) -> whether each answer refuses`, bool `[prompts]`.
    """

    wanted: Sequence[bool]
    refuses: Callable[[Sequence[Messages], Sequence[str]], Sequence[bool]]


class Judge(NamedTuple):
    """Check by a safety filter: a revised red-teaming answer must be safer than the initial one.

    Attributes:
      wanted: as in `Rules`.
      unsafe: `(dialogues, answers) -> P(unsafe)`, float `[prompts]`.
      threshold: P(unsafe) from which an answer is unsafe.
    """

    wanted: Sequence[bool]
    unsafe: Callable[[Sequence[Messages], Sequence[str]], np.ndarray]
    threshold: float


class Checks(NamedTuple):
    """Which checks a config's `cai.check` asks for.

    Attributes:
      refusal: spec of the judge of refusal that `Rules` take, such as "start"; "" for none.
      judge: whether the clients' filter is applied as the `Judge`.
    """

    refusal: str
    judge: bool


def parse_check(text: str) -> Checks:
    """Reads `cai.check`: a judge's spec, "filter", both as "SPEC+filter", or "none".

    >>> parse_check("start+filter"), parse_check("none")
    (Checks(refusal='start', judge=True), Checks(refusal='', judge=False))
    """
    if text in ("none", "filter"):
        return Checks("", text == "filter")
    spec = text.removesuffix("+filter")
    return Checks(spec, spec != text)


class Data(NamedTuple):
    """Records that a round trains on.

    Attributes:
      reuses: whether records of earlier rounds are trained on again.
      renews: whether every round generates records; else the first round alone.
      given: whether records come from files, see `cai.given`, and none are generated.
    """

    reuses: bool
    renews: bool
    given: bool = False


DATA = {
    "on_policy": Data(reuses=False, renews=True),
    "cached": Data(reuses=True, renews=False),
    "mixed": Data(reuses=True, renews=True),
    "given": Data(reuses=False, renews=False, given=True),
}


def revise(
    dialogues: Sequence[Messages],
    constitution: Constitution,
    answer: Generate,
    reviser: Generate,
    seed: Sequence[int],
    rounds: int = 1,
    num_few_shots: int = 0,
    rules: Rules | None = None,
    judge: Judge | None = None,
    only_wrong: bool = False,
    replace: bool = False,
    purpose: Purpose = Purpose.CAI_PRINCIPLES,
) -> list[Record]:
    """Generates answers, criticises and revises them, and checks the revisions.

    Runs `1 + 2 * rounds` generations, each for all dialogues at once. Critique and revision go on
    in the dialogue that was answered.

    Args:
      dialogues: (role, text) turns up to a request, such as `(("user", "How ...?"),)`.
      constitution: for each prompt and round one principle is drawn, which asks for both critique
        and revision.
      answer: gives the initial answers; the roles of a thread are those of `forms.LABELS`.
      reviser: gives critiques and revisions.
      seed: seed of the principles drawn and their place, such as (seed, round).
      rounds: number of rounds of critique and revision.
      num_few_shots: number of the constitution's examples that stand before each dialogue, behind
        its system prompt.
      rules, judge: checks; both may be given.
      only_wrong: whether answers that are right by every check given are left as they are.
      replace: whether a refusal of the constitution's, drawn at random, takes the place of each
        revision that would be dropped though a refusal is wanted.
      purpose: stream of the principles drawn.

    Returns:
      One record per dialogue. Dropped are revisions that are "empty", "cut", a "critique" of the
      answer instead of an answer, "unchanged" from the initial answer, "still harmful" or
      "over-refusal" by the rules, or "not safer" by the judge;
      with `only_wrong` also prompts whose answers "were right", which have no revision. Preference
      pairs are kept revisions whose initial answer was wrong by every check given.

    Raises:
      ValueError: `only_wrong` or `replace` without a check, or `replace` without a refusal.
    """
    checks = [check for check in (rules, judge) if check is not None]
    if (only_wrong or replace) and not checks:
        raise ValueError("only_wrong, replace: no check says what is wrong; give rules or judge.")
    if replace and not constitution.refusals:
        raise ValueError("replace: the constitution has no refusals.")
    rng = generator(purpose, *seed)
    drawn = rng.integers(len(constitution.principles), size=(rounds, len(dialogues)))
    refusals = rng.integers(max(len(constitution.refusals), 1), size=len(dialogues))
    before = [turn for shot in constitution.few_shots[:num_few_shots] for turn in shot]
    threads = []
    for turns in dialogues:
        count = system_turns(turns)
        threads.append([*turns[:count], *before, *turns[count:]])
    initial, _ = _say(answer, threads, "assistant", 0)
    wrong, risk = _wrong(dialogues, initial, rules, judge)
    chosen = np.flatnonzero(wrong.any(0)) if only_wrong else np.arange(len(dialogues))
    records = [
        Record(
            Example(tuple(turns), "").prompt,
            said,
            int(drawn[-1, i]),
            critique="",
            revision="",
            earlier=(),
            dropped="were right",
            preferred=False,
            messages=tuple(turns) if len(turns) > 1 else (),
        )
        for i, (turns, said) in enumerate(zip(dialogues, initial, strict=True))
    ]
    if not chosen.size:
        return records
    history, finished = _mend(
        [threads[i] for i in chosen], drawn[:, chosen], constitution.principles, reviser
    )
    revisions = history[-1][2]
    after, asked = None, [dialogues[i] for i in chosen]
    if judge is not None:
        after = judge.unsafe(asked, revisions)
        still_unsafe = flag(after, judge.threshold)
    if rules is not None:
        refused = rules.refuses(asked, revisions)
    for place, i in enumerate(chosen):
        *earlier, last = ((int(j[place]), c[place], r[place]) for j, c, r in history)
        reason, mends = _unusable(initial[i], revisions[place], finished[place]), wrong[:, i].all()
        if rules is not None and bool(refused[place]) != rules.wanted[i]:
            reason = reason or ("still harmful" if rules.wanted[i] else "over-refusal")
        if judge is not None:
            mends &= not still_unsafe[place]
            if judge.wanted[i] and after[place] >= risk[i]:
                reason = reason or "not safer"
        replaced = ""
        if replace and reason and checks[0].wanted[i]:
            # A refusal is right by every check.
            earlier, replaced, reason, mends = [*earlier, last], reason, "", wrong[:, i].all()
            last = (last[0], "", constitution.refusals[refusals[i]])
        principle, critique, revision = last
        records[i] = records[i]._replace(
            principle=principle,
            critique=critique,
            revision=revision,
            earlier=tuple(earlier),
            dropped=reason,
            preferred=bool(mends and not reason),
            replaced=replaced,
        )
    return records


def _say(
    generate: Generate, threads: list[list[tuple[str, str]]], role: str, call: int
) -> tuple[list[str], np.ndarray]:
    """Generates the next turn of every thread and appends it."""
    texts, finished = generate(threads, call)
    cleaned = [clean(text) for text in texts]
    for thread, (text, _) in zip(threads, cleaned, strict=True):
        thread.append((role, text))
    ended = np.array([e for _, e in cleaned], bool)
    return [text for text, _ in cleaned], np.asarray(finished, bool) | ended


def _mend(
    threads: list[list[tuple[str, str]]],
    drawn: np.ndarray,
    principles: Sequence[Principle],
    reviser: Generate,
) -> tuple[list[tuple[np.ndarray, list[str], list[str]]], np.ndarray]:
    """`([(principles, critiques, revisions) of each round], whether the last ones ended)`."""
    history = []
    for number, chosen in enumerate(drawn):
        for thread, j in zip(threads, chosen, strict=True):
            thread.append(("critique_request", principles[j].critique_request))
        critiques, _ = _say(reviser, threads, "critique", 2 * number + 1)
        for thread, j in zip(threads, chosen, strict=True):
            thread.append(("revision_request", principles[j].revision_request))
        revisions, finished = _say(reviser, threads, "revision", 2 * number + 2)
        history.append((chosen, critiques, revisions))
    return history, finished


def _wrong(
    dialogues: Sequence[Messages],
    answers: Sequence[str],
    rules: Rules | None,
    judge: Judge | None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """`(wrong, bool [checks, prompts], the judge's risk, float [prompts], or None)`."""
    wrong, risk = [], None
    if rules is not None:
        refused = np.array(rules.refuses(dialogues, answers), bool)
        wrong.append(refused != np.asarray(rules.wanted, bool))
    if judge is not None:
        risk = judge.unsafe(dialogues, answers)
        wrong.append(np.asarray(judge.wanted, bool) & flag(risk, judge.threshold))
    return np.array(wrong, bool).reshape(-1, len(dialogues)), risk


def _unusable(initial: str, revision: str, finished: bool) -> str:
    """Why a revision is of no use whatever it says, or ""."""
    if not revision:
        return "empty"
    if not finished:
        return "cut"
    if CRITIQUE.match(revision):
        return "critique"
    return "unchanged" if revision == initial else ""


def tally(records: Sequence[Record]) -> dict[str, int]:
    """Counts the kept records, those dropped for each reason, and those kept by a replacement."""
    counts = {"kept": 0}
    for record in records:
        counts[record.dropped or "kept"] = counts.get(record.dropped or "kept", 0) + 1
        if record.replaced:
            counts["replaced"] = counts.get("replaced", 0) + 1
    return counts
