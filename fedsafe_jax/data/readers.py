"""Readers by name: the rows of a file in its upstream form become `Example`s.

A reader takes `(place, row)` pairs, `place` to name in an error, and yields examples. The registry
is `READERS`; a reader from elsewhere is one more entry.
"""

import functools
import re
from collections.abc import Callable, Iterable

from fedsafe_jax.data.benchmark_readers import BENCHMARKS
from fedsafe_jax.data.dialogue_rows import read_dialogues, split_answer
from fedsafe_jax.data.examples import SAFE, UNKNOWN, UNSAFE, Example, SourceError
from fedsafe_jax.data.row_fields import answer, ask, field, one_of, optional

# Readers of benchmarks, which may be evaluated on and never trained on.
EVALUATION_ONLY = (
    "advbench",
    "advbench_targets",
    "xstest_safe",
    "xstest_unsafe",
    *BENCHMARKS,
)

Rows = Iterable[tuple[str, dict]]
EN, KO = ("_en", ""), ("",)  # endings of the fields: English where the row has it, or Korean


def _names(name: str, endings: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name + ending for ending in endings)


def _category(place: str, row: dict) -> str:
    """The category of SQuARe: a text, or a list of them."""
    value = row.get("category")
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        row = {"category": " ".join(value)}
    return optional(place, row, "category")


def _square(rows: Rows, endings: tuple[str, ...]) -> Iterable[Example]:
    yes, no = ("1", "1.0", "True", "true"), ("0", "0.0", "False", "false")
    for place, row in rows:
        label = SAFE if one_of(place, row, "acceptable?", yes + no) in yes else UNSAFE
        question = field(place, row, *_names("question", endings))
        said = field(place, row, *_names("response", endings))
        yield Example(ask(place, question), said, label, category=_category(place, row))


def _square_questions(rows: Rows, endings: tuple[str, ...]) -> Iterable[Example]:
    """Yields the questions alone: SQuARe has files of them beside those of answers."""
    for place, row in rows:
        question = field(place, row, *_names("question", endings))
        yield Example(ask(place, question), "", category=_category(place, row))


def _kosbi(rows: Rows, endings: tuple[str, ...]) -> Iterable[Example]:
    for place, row in rows:
        context = field(place, row, *_names("context", endings))
        sentence = field(place, row, *_names("sentence", endings))
        label = (
            SAFE if one_of(place, row, "sentence_label", ("safe", "unsafe")) == "safe" else UNSAFE
        )
        category = optional(place, row, "demographic_category")
        yield Example(ask(place, context), sentence, label, category=category)


def parse_dialogue(text: str) -> tuple[tuple[str, str], ...]:
    """Splits `\\n\\nHuman: ...\\n\\nAssistant: ...` text into (role, text) turns."""
    roles = {"Human": "user", "Assistant": "assistant"}
    parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.lstrip("\n"))[1:]
    said = zip(parts[::2], parts[1::2], strict=True)
    return tuple((roles[name], words.strip()) for name, words in said)


def _hh_rlhf(rows: Rows) -> Iterable[Example]:
    for place, row in rows:
        for side, label in (("chosen", SAFE), ("rejected", UNSAFE)):
            turns = parse_dialogue(field(place, row, side))
            if not turns or turns[-1][0] != "assistant":
                raise SourceError(f"{place}: '{side}' does not end in an Assistant turn.")
            messages, said = split_answer(f"{place}: '{side}'", turns)
            yield Example(messages, said, label)


def _hh_rejected(rows: Rows) -> Iterable[Example]:
    """Yields the rejected answers alone: `chosen` is the better of two, not necessarily safe."""
    return (e for e in _hh_rlhf(rows) if e.label == UNSAFE)


def _hh_first(rows: Rows) -> Iterable[Example]:
    """Yields what each dialogue begins with, once, as a prompt: later turns need the earlier."""
    for place, row in rows:
        turns = parse_dialogue(field(place, row, "chosen"))
        if not turns or turns[0][0] != "user":
            raise SourceError(f"{place}: 'chosen' does not begin with a Human turn.")
        yield Example(ask(place, turns[0][1]), "")


def _xstest(rows: Rows) -> Iterable[Example]:
    """Yields completions labelled by humans (XSTest, Röttger et al., 2024, arXiv 2308.01263).

    Complying with a `contrast_` prompt is unsafe; refusing, or complying with a safe prompt, is
    safe; partial refusals are unknown.
    """
    verdicts = ("1_full_compliance", "2_full_refusal", "3_partial_refusal")
    for place, row in rows:
        judged, kind = one_of(place, row, "final_label", verdicts), field(place, row, "type")
        complied = judged == "1_full_compliance"
        label = UNSAFE if complied and kind.startswith("contrast") else SAFE
        label = UNKNOWN if judged == "3_partial_refusal" else label
        said = answer(place, row, "completion").strip()
        yield Example(ask(place, field(place, row, "prompt")), said, label, category=kind)


def _xstest_prompts(rows: Rows, unsafe: bool) -> Iterable[Example]:
    """Yields XSTest's safe prompts, 250 of 450, or the unsafe ones in contrast to them, 200."""
    for place, row in rows:
        kind = field(place, row, "type")
        if kind.startswith("contrast_") == unsafe:
            yield Example(ask(place, field(place, row, "prompt")), "", category=kind)


def _instructions(rows: Rows, context: str, response: str) -> Iterable[Example]:
    """Yields an instruction, followed by its context where there is one, and the answer."""
    for place, row in rows:
        prompt = field(place, row, "instruction")
        if more := optional(place, row, context).strip():
            prompt = f"{prompt}\n\n{more}"
        said = answer(place, row, response)
        category = optional(place, row, "category")
        yield Example(ask(place, prompt), said, SAFE, category=category)


def _advbench(rows: Rows) -> Iterable[Example]:
    for place, row in rows:
        yield Example(ask(place, field(place, row, "goal")), "")


def _advbench_targets(rows: Rows) -> Iterable[Example]:
    """Yields AdvBench's requests with its targets: how an answer that complies would begin."""
    for place, row in rows:
        said = field(place, row, "target").strip()
        yield Example(ask(place, field(place, row, "goal")), said, UNSAFE, ended=False)


def _derta(rows: Rows) -> Iterable[Example]:
    for place, row in rows:
        prompt = field(place, row, "prefix", "question")
        prompt = prompt.removeprefix("### Instruction:\n").removesuffix("\n\n### Response:")
        yield Example(ask(place, prompt), optional(place, row, "text").strip(), UNSAFE)


def _prompts(rows: Rows) -> Iterable[Example]:
    for place, row in rows:
        prompt = field(place, row, "prompt", "instruction", "question", "goal")
        category = optional(place, row, "category", "type")
        language = optional(place, row, "language")
        yield Example(ask(place, prompt), "", category=category, language=language)


READERS: dict[str, Callable[[Rows], Iterable[Example]]] = {
    "square": functools.partial(_square, endings=EN),
    "square_ko": functools.partial(_square, endings=KO),
    "square_questions": functools.partial(_square_questions, endings=EN),
    "square_questions_ko": functools.partial(_square_questions, endings=KO),
    "kosbi": functools.partial(_kosbi, endings=EN),
    "kosbi_ko": functools.partial(_kosbi, endings=KO),
    "hh_rlhf": _hh_rlhf,
    "hh_rejected": _hh_rejected,
    "hh_first": _hh_first,
    "xstest": _xstest,
    "xstest_safe": functools.partial(_xstest_prompts, unsafe=False),
    "xstest_unsafe": functools.partial(_xstest_prompts, unsafe=True),
    "dolly": functools.partial(_instructions, context="context", response="response"),
    "alpaca": functools.partial(_instructions, context="input", response="output"),
    "advbench": _advbench,
    "advbench_targets": _advbench_targets,
    "derta": _derta,
    "prompts": _prompts,
    "chat": read_dialogues,
    **BENCHMARKS,
}
