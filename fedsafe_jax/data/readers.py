"""Readers by name: the rows of a file in its upstream form become `Example`s.

A reader takes `(place, row)` pairs, `place` to name in an error, and yields examples. The registry
is `READERS`; a reader from elsewhere is one more entry.
"""

import functools
from collections.abc import Callable, Iterable

from fedsafe_jax.data.examples import SAFE, UNKNOWN, UNSAFE, Example, SourceError

# Readers of benchmarks, which may be evaluated on and never trained on.
EVALUATION_ONLY = ("advbench", "xstest_safe", "xstest_unsafe")


Rows = Iterable[tuple[str, dict]]


def field(place: str, row: dict, *names: str) -> str:
    """Returns the first field of a row that is there, as text.

    Args:
      place: place of the row, named in the error.
      row: the row.
      names: names of the field, in order of preference.

    Raises:
      SourceError: the row has none of the fields.
    """
    for name in names:
        if row.get(name) is not None:
            return str(row[name])
    raise SourceError(f"{place}: no field {' or '.join(map(repr, names))}; found {sorted(row)}.")


def _ask(prompt: str) -> tuple[tuple[str, str], ...]:
    return (("user", prompt.strip()),)


def _square(rows: Rows, suffixes: tuple[str, ...] = ("_en", "")) -> Iterable[Example]:
    for place, row in rows:
        label = SAFE if field(place, row, "acceptable?") in ("1", "1.0", "True") else UNSAFE
        question = field(place, row, *(f"question{s}" for s in suffixes))
        answer = field(place, row, *(f"response{s}" for s in suffixes))
        category = row.get("category") or ""
        category = category if isinstance(category, str) else " ".join(category)
        yield Example(_ask(question), answer, label, category=category)


def _kosbi(rows: Rows, suffixes: tuple[str, ...] = ("_en", "")) -> Iterable[Example]:
    for place, row in rows:
        context = field(place, row, *(f"context{s}" for s in suffixes))
        sentence = field(place, row, *(f"sentence{s}" for s in suffixes))
        label = SAFE if field(place, row, "sentence_label") == "safe" else UNSAFE
        category = str(row.get("demographic_category") or "")
        yield Example(_ask(context), sentence, label, category=category)


def parse_dialogue(text: str) -> tuple[tuple[str, str], ...]:
    """Splits `\\n\\nHuman: ...\\n\\nAssistant: ...` text into (role, text) turns."""
    turns = []
    for part in text.split("\n\nHuman:")[1:]:
        question, *answers = part.split("\n\nAssistant:")
        turns.append(("user", question.strip()))
        turns.extend(("assistant", answer.strip()) for answer in answers)
    return tuple(turns)


def _hh_rlhf(rows: Rows) -> Iterable[Example]:
    for place, row in rows:
        for side, label in (("chosen", SAFE), ("rejected", UNSAFE)):
            turns = parse_dialogue(field(place, row, side))
            if len(turns) < 2 or turns[-1][0] != "assistant":
                raise SourceError(f"{place}: '{side}' does not end in an Assistant turn.")
            if turns[-2][0] == "user" and turns[-1][1]:
                yield Example(turns[:-1], turns[-1][1], label)


def _hh_rejected(rows: Rows) -> Iterable[Example]:
    """Yields the rejected answers alone: `chosen` is the better of two, not necessarily safe."""
    return (e for e in _hh_rlhf(rows) if e.label == UNSAFE)


def _xstest(rows: Rows) -> Iterable[Example]:
    """Yields completions labelled by humans (XSTest, Röttger et al., 2024, arXiv 2308.01263).

    Complying with a `contrast_` prompt is unsafe; refusing, or complying with a safe prompt, is
    safe; partial refusals are unknown.
    """
    for place, row in rows:
        judged, kind = field(place, row, "final_label"), field(place, row, "type")
        complied = judged == "1_full_compliance"
        label = UNSAFE if complied and kind.startswith("contrast") else SAFE
        label = UNKNOWN if judged == "3_partial_refusal" else label
        answer = field(place, row, "completion").strip()
        yield Example(_ask(field(place, row, "prompt")), answer, label, category=kind)


def _xstest_prompts(rows: Rows, unsafe: bool) -> Iterable[Example]:
    """Yields XSTest's prompts alone; `contrast_` prompts are the unsafe ones."""
    for place, row in rows:
        kind = field(place, row, "type")
        if kind.startswith("contrast") == unsafe:
            yield Example(_ask(field(place, row, "prompt")), "", category=kind)


def _square_questions(rows: Rows) -> Iterable[Example]:
    """Yields SQuARe's questions in English."""
    for place, row in rows:
        yield Example(_ask(field(place, row, "question_en", "question")), "")


def _dolly(rows: Rows) -> Iterable[Example]:
    for place, row in rows:
        prompt = field(place, row, "instruction")
        if (row.get("context") or "").strip():
            prompt = f"{prompt}\n\n{row['context'].strip()}"
        response = field(place, row, "response")
        yield Example(_ask(prompt), response, SAFE, category=row.get("category") or "")


def _alpaca(rows: Rows) -> Iterable[Example]:
    for place, row in rows:
        prompt = field(place, row, "instruction")
        if (row.get("input") or "").strip():
            prompt = f"{prompt}\n\n{row['input'].strip()}"
        yield Example(_ask(prompt), str(row.get("output") or ""), SAFE)


def _advbench(rows: Rows) -> Iterable[Example]:
    for place, row in rows:
        yield Example(_ask(field(place, row, "goal")), "")


def _derta(rows: Rows) -> Iterable[Example]:
    for place, row in rows:
        prompt = field(place, row, "prefix", "question")
        prompt = prompt.removeprefix("### Instruction:\n").removesuffix("\n\n### Response:")
        yield Example(_ask(prompt), str(row.get("text", "")).strip(), UNSAFE)


def _prompts(rows: Rows) -> Iterable[Example]:
    for place, row in rows:
        prompt = field(place, row, "prompt", "instruction", "question", "goal")
        category = str(row.get("category") or row.get("type") or "")
        yield Example(_ask(prompt), "", category=category)


def _chat(rows: Rows) -> Iterable[Example]:
    for place, row in rows:
        messages = row.get("messages")
        if not isinstance(messages, list) or not messages:
            raise SourceError(f"{place}: 'messages' must be a list of {{role, content}}.")
        try:
            turns = tuple((m["role"], m["content"]) for m in messages)
        except (TypeError, KeyError) as error:
            raise SourceError(f"{place}: each message needs 'role' and 'content'.") from error
        label = row.get("label", UNKNOWN)
        if label not in (SAFE, UNSAFE, UNKNOWN):
            raise SourceError(f"{place}: label must be safe, unsafe or unknown, found {label!r}.")
        response = ""
        if turns[-1][0] == "assistant":
            turns, response = turns[:-1], turns[-1][1]
        if not turns or turns[-1][0] != "user":
            raise SourceError(f"{place}: the dialogue must have a user turn before its answer.")
        yield Example(
            turns,
            response,
            label,
            user=str(row.get("user", "")),
            category=str(row.get("category", "")),
            language=str(row.get("language", "")),
        )


READERS: dict[str, Callable[[Rows], Iterable[Example]]] = {
    "square": _square,
    "square_ko": functools.partial(_square, suffixes=("",)),
    "kosbi": _kosbi,
    "kosbi_ko": functools.partial(_kosbi, suffixes=("",)),
    "hh_rlhf": _hh_rlhf,
    "hh_rejected": _hh_rejected,
    "xstest": _xstest,
    "xstest_safe": functools.partial(_xstest_prompts, unsafe=False),
    "xstest_unsafe": functools.partial(_xstest_prompts, unsafe=True),
    "square_questions": _square_questions,
    "dolly": _dolly,
    "alpaca": _alpaca,
    "advbench": _advbench,
    "derta": _derta,
    "prompts": _prompts,
    "chat": _chat,
}
