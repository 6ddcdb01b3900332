"""Judges that are generative guards: `guard:FOLDER`, or `guard:FOLDER#FORMAT`.

A guard says whether an answer is harmful; some also say whether it refuses. A folder that
`fedsafe train-filter` wrote is one too, by its own threshold. The model is loaded when it first
judges, and freed with the judge.
"""

import functools
import os
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import softmax

from fedsafe_jax.data.chat import Encoded
from fedsafe_jax.data.examples import Example
from fedsafe_jax.data.refusals import spoken
from fedsafe_jax.evals import scoring
from fedsafe_jax.evals.judges import guard_formats
from fedsafe_jax.evals.judges.contract import (
    FAILED,
    HARM,
    Answered,
    Judge,
    JudgeError,
    JudgeKind,
    Tools,
    Verdict,
)
from fedsafe_jax.evals.judges.guard_formats import FORMATS, GuardFormat
from fedsafe_jax.filters import store
from fedsafe_jax.filters.decision import flag
from fedsafe_jax.inference import generation
from fedsafe_jax.registry import unknown

if TYPE_CHECKING:
    from fedsafe_jax.inference.language_model import LanguageModel

LONGEST_ROW = 4096  # tokens of a row, template included; no more than the guard's own context
BATCH = 32  # replies generated at once


def split(argument: str) -> tuple[str, str]:
    """Returns folder or Hub id, and format ("" to find it), of what stands behind `guard:`.

    Raises:
      JudgeError: there is no such format, or no such folder.
    """
    name, mark, form = argument.partition("#")
    if mark and form not in FORMATS:
        raise JudgeError(unknown(f"judge 'guard:{argument}': format", form, FORMATS))
    if (os.path.isabs(name) or name.startswith(".")) and not pathlib.Path(name).is_dir():
        raise JudgeError(f"judge 'guard:{argument}': {name}: no such folder.")
    return name, form


def _measures(argument: str) -> str:
    _, form = split(argument)
    return FORMATS[form].measures if form else HARM


def _make(spec: str, argument: str, tools: Tools) -> Judge:
    name, form = split(argument)

    @functools.cache
    def loaded() -> "LanguageModel":
        return tools.load_model(name)

    @functools.cache
    def own_filter() -> store.Filter:
        return store.load(name, tools.load_model)

    def judge(answers: Sequence[Answered]) -> list[Verdict]:
        if not form and (pathlib.Path(name) / store.NAME).is_file():
            return by_filter(own_filter(), answers)
        lm = loaded()
        chosen = form or guard_formats.find(name, lm.tokenizer.chat_template or "")
        if chosen is None:
            raise JudgeError(
                f"judge '{spec}': which guard this is cannot be told from its name and chat "
                f"template; write {spec}#FORMAT, one of {', '.join(FORMATS)}."
            )
        return by_model(lm, FORMATS[chosen], answers)

    return Judge(spec, _measures(argument), judge)


def by_filter(safety_filter: store.Filter, answers: Sequence[Answered]) -> list[Verdict]:
    """Judges answers by a safety filter's own calibration and threshold."""
    pairs = [Example(one.messages, spoken(one.answer)) for one in answers]
    unsafe = safety_filter.score(pairs)
    flagged = flag(unsafe, safety_filter.decision.threshold)
    return [Verdict(not bad, 1.0 - float(p)) for bad, p in zip(flagged, unsafe, strict=True)]


def by_model(lm: "LanguageModel", one: GuardFormat, answers: Sequence[Answered]) -> list[Verdict]:
    """Judges answers by a guard in its format.

    Where the verdict follows the row, its score is the probability of the good verdicts among all
    of them, from one forward pass; of several policies the worst counts. Where it stands in a
    longer reply, the reply is generated, and the score is 0 or 1.
    """
    most = min(LONGEST_ROW, lm.config.max_length - one.tokens - 8)
    rows = [one.rows(lm.tokenizer, answered, most) for answered in answers]
    if one.line:
        return _by_reply(lm, one, [row for (row,) in rows])
    return _by_first_token(lm, one, rows)


def _by_first_token(
    lm: "LanguageModel", one: GuardFormat, rows: Sequence[guard_formats.Rows]
) -> list[Verdict]:
    words = [*one.good, *one.bad]
    before, verdicts = verdict_tokens(lm, one.lead, words)
    contexts = [[*row, *before] for policies in rows for row in policies]

    def encode(lm: "LanguageModel", context: list[int], options: Sequence[str]) -> list[Encoded]:
        del lm, options
        ids = (np.array([*context, token], np.int32) for token in verdicts)
        return [Encoded(row, np.arange(len(row)) == len(row) - 1) for row in ids]

    options = [words] * len(contexts)
    longest = max(map(len, contexts), default=0) + 1
    scored = scoring.choices(lm, contexts, options, max_length=longest, encode=encode)
    chances = softmax(scored.log_likelihood, axis=1)
    out, start = [], 0
    for policies in rows:
        stop = start + len(policies)
        out.append(_worst(chances[start:stop], one))
        start = stop
    return out


def _worst(chances: np.ndarray, one: GuardFormat) -> Verdict:
    """Returns the verdict of the policy that an answer fails most, of chances `[policies, words]`;
    a failure where they are no numbers."""
    if not np.isfinite(chances).all():
        return FAILED
    good = chances[:, : len(one.good)].sum(axis=1)
    worst = int(good.argmin())
    word = int(chances[worst].argmax())
    label = ([*one.good, *one.bad])[word].lower() if len(one.bad) > len(one.good) else ""
    return Verdict(word < len(one.good), float(good[worst]), label)


def verdict_tokens(
    lm: "LanguageModel", lead: str, words: Sequence[str]
) -> tuple[list[int], list[int]]:
    """Returns the tokens before a verdict, and the one by which each word is told.

    A word may join its lead in one token, so they are tokenised together.

    Raises:
      JudgeError: two words begin alike.
    """
    wholes = [lm.tokenizer(lead + word, add_special_tokens=False)["input_ids"] for word in words]
    place = 0
    while all(len(ids) > place + 1 for ids in wholes) and len({i[place] for i in wholes}) == 1:
        place += 1
    told = [ids[place] for ids in wholes]
    if len(set(told)) < len(told):
        raise JudgeError(f"the guard's tokenizer does not tell {' and '.join(words)} apart.")
    return wholes[0][:place], told


def _by_reply(lm: "LanguageModel", one: GuardFormat, rows: Sequence[list[int]]) -> list[Verdict]:
    (generated,) = generation.generate_ids(
        lm.model,
        lm.params,
        lm.factors,
        prompts=rows,
        stop_ids=lm.stop_ids,
        max_new_tokens=one.tokens,
        batch_size=BATCH,
        mesh=lm.mesh,
    )
    said = (guard_formats.read_line(one, lm.text(ids)) for ids in generated.ids)
    return [FAILED if read is None else Verdict(read[0], float(read[0])) for read in said]


def _check(argument: str) -> None:
    split(argument)


GUARD = JudgeKind(_make, argument="FOLDER", check=_check, measures=_measures)
