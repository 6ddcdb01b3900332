"""Rewriting of unsafe texts: without bias, toxicity or harm, the meaning kept; never a refusal.

The task is that of SR_LLM (Raza et al., 2024, arXiv 2404.01399), in words of our own: a language
model writes a text anew, and what it writes is accepted where a filter's risk falls.
"""

import os
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedsafe_jax.data.examples import Example, Messages, SourceError
from fedsafe_jax.data.refusals import spoken
from fedsafe_jax.data.text_files import read_text
from fedsafe_jax.filters.actions import NewAnswer
from fedsafe_jax.filters.decision import flag
from fedsafe_jax.filters.pairs import Refuses
from fedsafe_jax.filters.protocol import FilterError

# How the base model writes the new answers of the action `rewrite`: by critique and revision, as in
# Constitutional AI, until it refuses; or as here.
REVISE, DEBIAS = WAYS = ("revise", "debias")
TEXT = "{text}"  # stands for the text in an instruction
INSTRUCTION = (
    "Rewrite the text below so that it is free of bias, stereotypes, insults, toxicity and harm. "
    "Keep what it is about, what it means, its language and roughly its length. Do not answer the "
    "text, do not comment on it and do not decline: write the new text alone.\n\nText: " + TEXT
)
MOST_CHARACTERS = 20_000  # of an instruction; a page has some 3,000
# Why a rewriting is not accepted, in the order in which it is looked for.
REASONS = ("cut", "empty", "unchanged", "echo", "refusal", "still unsafe", "not safer")
ECHOED = ("unchanged", "echo")
# So many words of the instruction in a row, which the text did not have, are an echo; parts of an
# instruction with fewer than the second number, such as "Text:", are not looked for.
ECHO_WORDS, PART_WORDS = 8, 4

Risk = Callable[[Sequence[Example]], np.ndarray]  # pairs -> P(unsafe) of each, float `[n]`
# What announces the new text, on one line that a colon ends.
_LEAD = re.compile(
    r"^(?:(?:Sure|Certainly|Of course|Okay)[,.!]?\s+)?"
    r"(?:[Hh]ere(?: is| are|['’]s)\b[^\n:]{0,80}"
    r"|(?:[Tt]he )?(?:[Rr]ewritten|[Nn]ew|[Rr]evised) (?:text|version|sentence|answer)|Text):\s*"
)
_QUOTES = {'"': '"', "“": "”"}


class Rewritten(NamedTuple):
    """One text after its rewriting.

    Attributes:
      text: what the model wrote; an accepted one takes the text's place.
      reason: why it is not accepted, one of `REASONS`; "" where it is.
      before: P(unsafe) of the text.
      after: P(unsafe) of what was written; None where the reason is known without it.
    """

    text: str
    reason: str
    before: float
    after: float | None


def load_instruction(path: str) -> str:
    """Reads an instruction: a text file in which `{text}` stands once, for the text.

    Args:
      path: the file; "" for the packaged instruction.

    Raises:
      FilterError: no file, no text, too long, or `{text}` is not there once.
    """
    if not path:
        return INSTRUCTION
    if not os.path.isfile(path):
        raise FilterError(f"filter.instruction: {path}: no such file.")
    try:
        _, read = read_text(pathlib.Path(path))
    except SourceError as error:
        raise FilterError(f"filter.instruction: {error}") from None
    if (count := read.count(TEXT)) != 1 or len(read) > MOST_CHARACTERS:
        raise FilterError(
            f"filter.instruction: {path}: {TEXT} is there {count} times in {len(read):,} "
            f"characters; expected once, in at most {MOST_CHARACTERS:,}."
        )
    return read.strip()


def requests(texts: Sequence[str], instruction: str = INSTRUCTION) -> list[Messages]:
    """Returns the dialogue that asks a model to rewrite each text.

    Args:
      texts: the texts.
      instruction: what is asked, with `{text}` once.
    """
    return [(("user", instruction.replace(TEXT, text)),) for text in texts]


def ask(
    lm: Any, dialogues: Sequence[Messages], max_new_tokens: int, **options: Any
) -> tuple[list[str], np.ndarray]:
    """Answers requests whole: of one that is cut to the context, the meaning cannot be kept.

    Args:
      lm: model that rewrites, such as an `inference.language_model.LanguageModel`.
      dialogues: what `requests` returns, under a system prompt or not.
      max_new_tokens: longest new text.
      **options: other options of `lm.answer_dialogues`.

    Returns:
      `(texts, finished bool [n])`, without what stands around the new text, see `clean`; "" and
      False where a request does not fit the model's context.
    """
    room = lm.config.max_length - max_new_tokens
    prompts = lm.render(dialogues, max_new_tokens, truncate=False)
    fitting = [i for i, prompt in enumerate(prompts) if len(prompt) <= room]
    texts, finished = [""] * len(dialogues), np.zeros(len(dialogues), bool)
    if fitting:
        said, ended = lm.answer_dialogues(
            [dialogues[i] for i in fitting], max_new_tokens, **options
        )
        finished[fitting] = ended
        for i, text in zip(fitting, said, strict=True):
            texts[i] = clean(text)
    return texts, finished


def clean(text: str) -> str:
    """Returns the new text of a reply, without a thought, an announcement or quotes around it.

    >>> clean('Sure! Here is the rewritten text:\\n"All of us are late at times."')
    'All of us are late at times.'
    """
    text = _LEAD.sub("", spoken(text).strip(), count=1).strip()
    if len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and text[0] not in text[1:-1]:
        text = text[1:-1].strip()
    return text


def unusable(text: str, source: str, instruction: str, finished: bool = True) -> str:
    """Returns why a new text is none whatever it says; "" where it may be one.

    Args:
      text: what the model wrote.
      source: the text that was to be written anew.
      instruction: what was asked, with `{text}`.
      finished: whether the model ended it.

    Returns:
      "empty", "cut", "unchanged" (the words of the source) or "echo" (words of the instruction:
      eight in a row, or nothing else).
    """
    if not source.strip():
        return "empty"
    if not finished:
        return "cut"
    if not text.strip():
        return "empty"
    ours, theirs = _words(text), _words(source)
    if ours == theirs:
        return "unchanged"
    for part in map(_words, instruction.split(TEXT)):
        size = min(ECHO_WORDS, len(part))
        starts = range(len(part) - size + 1) if size >= PART_WORDS else ()
        runs = [part[start : start + size] for start in starts]
        if any(_contains(ours, run) and not _contains(theirs, run) for run in runs):
            return "echo"
        if ours and _contains(part, ours) and not _contains(theirs, ours):
            return "echo"
    return ""


def rewrite(
    lm: Any,
    pairs: Sequence[Example],
    instruction: str,
    risk: Risk,
    refuses: Refuses,
    threshold: float,
    max_new_tokens: int = 64,
) -> list[Rewritten]:
    """Rewrites the answers of pairs by a model, and says which of the new ones are accepted.

    A new text is accepted where it is finished, neither empty nor the old one nor the instruction's
    words, no refusal, and its P(unsafe) in the pair's dialogue is below the threshold and below the
    old text's.

    Args:
      lm: model that rewrites, see `ask`.
      pairs: pairs whose answers are rewritten.
      instruction: what is asked, with `{text}` for the answer.
      risk: P(unsafe) of pairs, called once with all that are scored.
      refuses: judge of refusal.
      threshold: P(unsafe) from which a text is unsafe.
      max_new_tokens: longest new text.

    Raises:
      FilterError: a score or the threshold is no probability.
    """
    if not pairs:
        return []
    asked = requests([pair.response for pair in pairs], instruction)
    texts, finished = ask(lm, asked, max_new_tokens)
    refused = refuses([pair.messages for pair in pairs], texts)
    reasons = [
        unusable(text, pair.response, instruction, bool(ended)) or ("refusal" if no else "")
        for text, pair, ended, no in zip(texts, pairs, finished, refused, strict=True)
    ]
    left = [i for i, reason in enumerate(reasons) if not reason]
    new = [pairs[i]._replace(response=texts[i]) for i in left]
    before, after = np.split(np.asarray(risk([*pairs, *new])), [len(pairs)])
    for i, p, unsafe in zip(left, after, flag(after, threshold), strict=True):
        reasons[i] = "still unsafe" if unsafe else "" if p < before[i] else "not safer"
    scored = dict(zip(left, after.tolist(), strict=True))
    return [
        Rewritten(text, reason, float(before[i]), scored.get(i))
        for i, (text, reason) in enumerate(zip(texts, reasons, strict=True))
    ]


def new_answers(lm: Any, pairs: Sequence[Example], **options: Any) -> list[NewAnswer]:
    """Rewrites the answers of flagged pairs, as `actions.apply` asks for them.

    Args:
      lm, pairs, **options: as in `rewrite`.
    """
    written = rewrite(lm, pairs, **options)
    return [NewAnswer("" if one.reason else one.text, one.reason) for one in written]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _contains(words: Sequence[str], run: Sequence[str]) -> bool:
    return f" {' '.join(run)} " in f" {' '.join(words)} "
