"""Judges that are generative guards: `guard:FOLDER`, or `guard:FOLDER#FORMAT`.

A guard says whether an answer is harmful; some also say whether it refuses. A folder that
`fedsafe train-filter` wrote is one too, by its own threshold. The model is loaded when it first
judges, and freed with the judge.
"""

import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from absl import logging
from scipy.special import logsumexp, softmax

from fedsafe_jax.data.chat import UNCUT, Encoded
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
from fedsafe_jax.models import base_model, hub
from fedsafe_jax.models.decoder_config import ModelError
from fedsafe_jax.models.gguf_reader import is_gguf
from fedsafe_jax.models.model_files import read_json
from fedsafe_jax.registry import unknown

if TYPE_CHECKING:
    from fedsafe_jax.inference.language_model import LanguageModel

LONGEST_ROW = 4096  # tokens of a row, template included; no more than the guard's own context
BATCH = 32  # replies generated at once
PLAIN = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def split(argument: str) -> tuple[str, str]:
    """Returns folder or Hub id, and format ("" to find it), of what stands behind `guard:`.

    Raises:
      JudgeError: there is no such format, or no such folder.
    """
    name, mark, form = argument.partition("#")
    if mark and form not in FORMATS:
        raise JudgeError(unknown(f"judge 'guard:{argument}': format", form, FORMATS))
    packaged = name == base_model.PACKAGED
    on_hub = name.count("/") == 1 and not os.path.isabs(name) and not name.startswith(".")
    is_here = os.path.isdir(name) or (is_gguf(name) and os.path.isfile(name))
    if not packaged and not on_hub and not is_here:
        raise JudgeError(
            f"judge 'guard:{argument}': {name}: no such folder, and not a Hub id (owner/name)."
        )
    return name, form


def template_in(folder: pathlib.Path) -> str:
    """Returns the chat template of a model's folder, as text; "" without one.

    Raises:
      ModelError: a file is damaged.
    """
    if os.path.isfile(path := folder / "chat_template.jinja"):
        return path.read_text(encoding="utf-8", errors="replace")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if os.path.isfile(path := folder / name) and (held := read_json(path).get("chat_template")):
            return held if isinstance(held, str) else str(held)
    return ""


def _is_filter(argument: str) -> bool:
    name, form = split(argument)
    return not form and os.path.isfile(pathlib.Path(name) / store.NAME)


def _check(argument: str) -> None:
    name, form = split(argument)
    folder = pathlib.Path(name)
    if not os.path.isdir(folder) or _is_filter(argument):  # on the Hub, or told by its own file
        return
    try:
        hub.hf_config(read_json(folder / "config.json"))
        known = form or _format_of(name)
    except ModelError as error:
        raise JudgeError(f"judge 'guard:{argument}': {error}") from None
    if known is None:
        raise _unknown(argument)


def _format_of(name: str) -> str | None:
    """The format of a folder, by its chat template or name, or of a Hub id by its name alone."""
    return guard_formats.find(os.path.abspath(name), template_in(pathlib.Path(name)))


def _unknown(argument: str) -> JudgeError:
    return JudgeError(
        f"judge 'guard:{argument}': which guard this is cannot be told from its name and chat "
        f"template; write guard:{argument}#FORMAT, one of {', '.join(FORMATS)}."
    )


def _measures(argument: str) -> str:
    _, form = split(argument)
    return FORMATS[form].measures if form else HARM


def _make(spec: str, argument: str, tools: Tools) -> Judge:
    @functools.cache
    def loaded() -> Guard:
        if tools.load_model is None and not _is_filter(argument):
            raise JudgeError(f"judge '{spec}': no models are loaded here.")
        return load(argument, tools.load_model)

    return Judge(spec, _measures(argument), lambda answers: loaded().judge(answers))


class Guard(NamedTuple):
    """A guard that is loaded.

    Attributes:
      judge: `answers -> verdicts`.
      taxonomy: names of its categories, by what it writes for each; {} where it knows none.
      words: its bad verdicts, where it has several.
    """

    judge: Callable[[Sequence[Answered]], list[Verdict]]
    taxonomy: Mapping[str, str]
    words: tuple[str, ...] = ()


def load(argument: str, load_model: Callable[..., "LanguageModel"] | None) -> Guard:
    """Loads a guard, or a filter that `fedsafe train-filter` wrote.

    Args:
      argument: folder or Hub id, and `#FORMAT` where the family cannot be told.
      load_model: loads a language model by path or Hub id, as in `Tools`.

    Raises:
      JudgeError: there is no such folder, or which guard it is cannot be told.
      FilterError, ModelError: it cannot be loaded.
    """
    name, form = split(argument)
    if _is_filter(argument):
        return Guard(functools.partial(by_filter, store.load(name, load_model)), {})
    known = form or _format_of(name)
    # Plain guards may have no template of their own.
    options = {"chat_template": PLAIN} if known and FORMATS[known].plain else {}
    lm = load_model(name, **options)
    chosen = known or guard_formats.find(name, lm.tokenizer.chat_template or "")
    if chosen is None:
        raise _unknown(argument)
    one = FORMATS[chosen]
    words = tuple(word.lower() for word in one.bad) if len(one.bad) > len(one.good) else ()
    return Guard(
        functools.partial(by_model, lm, one), guard_formats.taxonomy(one, lm.tokenizer), words
    )


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
    whole = (one.rows(lm.tokenizer, answered, UNCUT) for answered in answers)
    if cut := sum(any(len(row) > most for row in each) for each in whole):
        logging.warning(
            "%d of %d answers are longer than the guard's %d tokens: of these it reads the "
            "answer's beginning and the end of the dialogue",
            cut,
            len(answers),
            most,
        )
    if one.line:
        return _by_reply(lm, one, [row for (row,) in rows])
    return _by_first_token(lm, one, rows)


def _by_first_token(
    lm: "LanguageModel", one: GuardFormat, rows: Sequence[guard_formats.Rows]
) -> list[Verdict]:
    words = [*one.good, *one.bad]
    before, verdicts, _ = verdict_tokens(lm, one.lead, words)
    contexts = [[*row, *before] for policies in rows for row in policies]

    def encode(lm: "LanguageModel", context: list[int], options: Sequence[str]) -> list[Encoded]:
        del lm, options
        ids = (np.array([*context, token], np.int32) for token in verdicts)
        return [Encoded(row, np.arange(len(row)) == len(row) - 1) for row in ids]

    options = [words] * len(contexts)
    longest = max(map(len, contexts), default=0) + 1
    scored = scoring.choices(lm, contexts, options, max_length=longest, encode=encode)
    out, start = [], 0
    for policies in rows:
        stop = start + len(policies)
        out.append(_worst(scored.log_likelihood[start:stop], one))
        start = stop
    return _with_hazards(lm, one, [policies[0] for policies in rows], out)


def _worst(log_likelihood: np.ndarray, one: GuardFormat) -> Verdict:
    """Returns the verdict of the policy that an answer fails most, of `[policies, words]`.

    A failure where they are no numbers, or where a guard would say something else than a verdict.
    """
    said = np.exp(logsumexp(log_likelihood, axis=1))
    if not np.isfinite(said).all() or (said < one.least).any():
        return FAILED
    chances = softmax(log_likelihood, axis=1)
    good = chances[:, : len(one.good)].sum(axis=1)
    worst = int(good.argmin())
    words = chances.argmax(axis=1)
    broken = words >= len(one.good)
    label = ", ".join(name for name, bad in zip(one.policies, broken, strict=False) if bad)
    if len(one.bad) > len(one.good):
        label = ([*one.good, *one.bad])[words[worst]].lower()
    told = tuple(zip(one.policies, good.tolist(), strict=True)) if one.policies else ()
    return Verdict(not broken[worst], float(good[worst]), label, hazards=told)


def _with_hazards(
    lm: "LanguageModel",
    one: GuardFormat,
    rows: Sequence[list[int]],
    verdicts: Sequence[Verdict],
) -> list[Verdict]:
    """Returns verdicts with the hazard categories that the guard says behind a bad one."""
    labelled = list(verdicts)
    bad = [i for i, verdict in enumerate(verdicts) if verdict.refused is False]
    if not one.hazards or not bad:
        return labelled
    _, _, wholes = verdict_tokens(lm, one.lead, [*one.good, *one.bad])
    spelled = dict(zip([*one.good, *one.bad], wholes, strict=True))
    by_label = {word.lower(): word for word in one.bad}
    said = [by_label.get(verdicts[i].label, one.bad[0]) for i in bad]
    prompts = [[*rows[i], *spelled[word]] for i, word in zip(bad, said, strict=True)]
    for i, reply in zip(bad, _replies(lm, prompts, one.tokens), strict=True):
        if names := guard_formats.hazards_of(one, reply):
            named, before = ", ".join(names), verdicts[i].label
            label = f"{before}: {named}" if before else named
            told = tuple((name, verdicts[i].score) for name in names)
            labelled[i] = verdicts[i]._replace(label=label, hazards=told)
    return labelled


def verdict_tokens(
    lm: "LanguageModel", lead: str, words: Sequence[str]
) -> tuple[list[int], list[int], list[list[int]]]:
    """Returns the tokens before a verdict, the one by which each word is told, and each whole.

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
    return wholes[0][:place], told, wholes


def _replies(lm: "LanguageModel", rows: Sequence[list[int]], tokens: int) -> list[str]:
    """What the guard says behind each row."""
    (generated,) = generation.generate_ids(
        lm.model,
        lm.params,
        lm.factors,
        prompts=rows,
        stop_ids=lm.stop_ids,
        max_new_tokens=tokens,
        batch_size=BATCH,
        mesh=lm.mesh,
    )
    return [lm.text(ids) for ids in generated.ids]


def _by_reply(lm: "LanguageModel", one: GuardFormat, rows: Sequence[list[int]]) -> list[Verdict]:
    said = (guard_formats.read_line(one, reply) for reply in _replies(lm, rows, one.tokens))
    return [FAILED if read is None else Verdict(read[0], float(read[0])) for read in said]


GUARD = JudgeKind(_make, argument="FOLDER", check=_check, measures=_measures)
