"""Generate, critique, revise: the data of Constitutional AI (Bai et al., 2022, section 3)."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fedsafe_jax.cai.constitution import Constitution
from fedsafe_jax.cai.forms import clean


class Record(NamedTuple):
    """One prompt's way through the loop.

    Attributes:
      prompt, initial: the request and the first answer.
      principle, critique, revision: of the last round of revision.
      earlier: `(principle, critique, revision)` of the rounds before it.
      dropped: why the revision is not trained on; "" where it is.
      preferred: the revision mends the initial answer: a preference pair.
    """

    prompt: str
    initial: str
    principle: int
    critique: str
    revision: str
    earlier: tuple[tuple[int, str, str], ...]
    dropped: str
    preferred: bool


Generate = Callable[[Sequence[Sequence[tuple[str, str]]], int], tuple[list[str], np.ndarray]]


class Rules(NamedTuple):
    """A check by the form of answers: red-teaming is refused, harmless requests are not.

    Attributes:
      wanted: bool `[prompts]`, True for red-teaming.
      refuses: whether a text refuses.
    """

    wanted: Sequence[bool]
    refuses: Callable[[str], bool]


class Judge(NamedTuple):
    """A check by a safety filter: a revision of a red-teaming answer must be safer than it.

    Attributes:
      wanted: as in `Rules`.
      unsafe: `(prompts, answers) -> P(unsafe)`, float `[prompts]`.
      threshold: from which an answer is unsafe.
    """

    wanted: Sequence[bool]
    unsafe: Callable[[Sequence[str], Sequence[str]], np.ndarray]
    threshold: float


def revise(
    prompts: Sequence[str],
    constitution: Constitution,
    answer: Generate,
    reviser: Generate,
    seed: Sequence[int],
    rounds: int = 1,
    few_shots: int = 0,
    rules: Rules | None = None,
    judge: Judge | None = None,
) -> list[Record]:
    """Runs `1 + 2 * rounds` generations, each for all prompts at once.

    Args:
      prompts: user requests.
      constitution: for each prompt and round one principle is drawn, which asks for both critique
        and revision.
      answer: gives the initial answers, `(threads, call number) -> (texts, finished)`; the roles of
        a thread are those of `forms.LABELS`.
      reviser: gives critiques and revisions.
      seed: of the principles drawn, such as (seed, round).
      rounds: of critique and revision.
      few_shots: examples of the constitution that stand before each prompt.
      rules, judge: checks; both may be given.

    Returns:
      A record a prompt. Dropped are revisions that are "empty", "cut", "unchanged" from the initial
      answer, "still harmful" or "over-refusal" by the rules, or "not safer" by the judge.
      Preference pairs are kept revisions whose initial answer was wrong by every check given.
    """
    drawn = np.random.default_rng(seed).integers(
        len(constitution.principles), size=(rounds, len(prompts))
    )
    before = [turn for shot in constitution.few_shots[:few_shots] for turn in shot]
    threads = [[*before, ("user", prompt)] for prompt in prompts]
    initial, _ = _say(answer, threads, "assistant", 0)
    history = []
    for number, chosen in enumerate(drawn):
        principles = [constitution.principles[j] for j in chosen]
        for thread, principle in zip(threads, principles, strict=True):
            thread.append(("critique_request", principle.critique_request))
        critiques, _ = _say(reviser, threads, "critique", 2 * number + 1)
        for thread, principle in zip(threads, principles, strict=True):
            thread.append(("revision_request", principle.revision_request))
        revisions, finished = _say(reviser, threads, "revision", 2 * number + 2)
        history.append([chosen.tolist(), critiques, revisions])
    by_prompt = [list(zip(*h, strict=True)) for h in history]
    reasons = _reasons(prompts, initial, revisions, finished, rules, judge)
    records = []
    for i, prompt in enumerate(prompts):
        reason, mends = reasons[i]
        *earlier, last = (steps[i] for steps in by_prompt)
        records.append(Record(prompt, initial[i], *last, tuple(earlier), reason, mends))
    return records


def _say(generate, threads, role, call):
    """Generates the next turn of every thread and appends it."""
    texts, finished = generate(threads, call)
    cleaned = [clean(text) for text in texts]
    for thread, (text, _) in zip(threads, cleaned, strict=True):
        thread.append((role, text))
    ended = np.array([e for _, e in cleaned], bool)
    return [text for text, _ in cleaned], np.asarray(finished, bool) | ended


def _reasons(prompts, initial, revisions, finished, rules, judge) -> list[tuple[str, bool]]:
    """`(why it is dropped or "", whether it mends the initial answer)` by prompt."""
    before = after = None
    if judge is not None:
        before, after = (judge.unsafe(prompts, answers) for answers in (initial, revisions))
    found = []
    for i in range(len(prompts)):
        reason, mends = "", True
        if not revisions[i]:
            reason = "empty"
        elif not finished[i]:
            reason = "cut"
        elif revisions[i] == initial[i]:
            reason = "unchanged"
        elif rules is not None and rules.refuses(revisions[i]) != rules.wanted[i]:
            reason = "still harmful" if rules.wanted[i] else "over-refusal"
        elif judge is not None and judge.wanted[i] and after[i] >= before[i]:
            reason = "not safer"
        if rules is not None:
            mends &= rules.refuses(initial[i]) != rules.wanted[i]
        if judge is not None:
            mends &= bool(judge.wanted[i] and before[i] >= judge.threshold > after[i])
        found.append((reason, mends and not reason))
    return found


def tally(records: Sequence[Record]) -> dict[str, int]:
    """Kept records, and those dropped for each reason."""
    counts = {"kept": 0}
    for record in records:
        counts[record.dropped or "kept"] = counts.get(record.dropped or "kept", 0) + 1
    return counts
