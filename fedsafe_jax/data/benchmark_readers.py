"""Readers of safety benchmarks in their upstream form. They are evaluated on, never trained on.

`BENCHMARKS` is joined to `readers.READERS`. A request keeps its category, and in `Example.groups`
what else a benchmark sums up by.
"""

import functools
import re
from collections.abc import Callable, Iterable

from fedsafe_jax.data.examples import Example, SourceError
from fedsafe_jax.data.row_fields import ask, field, one_of, optional
from fedsafe_jax.data.text_files import parse_json, shorten

Rows = Iterable[tuple[str, dict]]

ATTACK, AREA, FUNCTIONAL, HARM_TYPE, STYLE = "attack", "area", "functional", "harm_type", "style"
ALERT_AREAS = ("hate", "crime", "substance", "sex", "self_harm", "weapon")
SAFETY_PROMPTS_ATTACKS = (
    "Goal_Hijacking",
    "Prompt_Leaking",
    "Role_Play_Instruction",
    "Unsafe_Instruction_Topic",
    "Inquiry_With_Unsafe_Opinion",
    "Reverse_Exposure",
)
_WRAPPED = re.compile(r"\s*### Instruction:\s*(.*?)\s*(?:### Response:\s*)?", re.DOTALL)


def _harmbench(rows: Rows) -> Iterable[Example]:
    """Yields standard and contextual behaviours (Mazeika et al., 2024, arXiv 2402.04249).

    A context stands before its behaviour, with a line of three dashes between them, as upstream
    asks. Copyright is left out: upstream judges it by hashes of the protected texts.
    """
    for place, row in rows:
        kinds = ("standard", "contextual", "copyright")
        kind = one_of(place, row, "FunctionalCategory", kinds)
        if kind == "copyright":
            continue
        text = field(place, row, "Behavior")
        if context := optional(place, row, "ContextString"):
            text = f"{context}\n\n---\n\n{text}"
        category = optional(place, row, "SemanticCategory")
        yield Example(ask(place, text), "", category=category, groups=_groups((FUNCTIONAL, kind)))


def _simple(rows: Rows, prompt: tuple[str, ...], category: tuple[str, ...]) -> Iterable[Example]:
    """Yields a prompt and its category from two fields, the first of each that is there, and its
    `language` where the row has one."""
    for place, row in rows:
        asked = ask(place, field(place, row, *prompt))
        named = optional(place, row, *category)
        yield Example(asked, "", category=named, language=optional(place, row, "language"))


def _do_not_answer(rows: Rows) -> Iterable[Example]:
    """Yields the questions (Wang et al., 2023, arXiv 2308.13387): the original CSV, or lines of a
    prompt, whose risk area is the name of their file."""
    for place, row in rows:
        asked = ask(place, field(place, row, "question", "prompt", "prompt_en"))
        harm = optional(place, row, "types_of_harm")
        area = optional(place, row, "risk_area")
        yield Example(asked, "", category=area, groups=_groups((HARM_TYPE, harm)))


def _s_eval(rows: Rows) -> Iterable[Example]:
    """Yields prompts by risk and, in the attack sets, by attack (Yuan et al., arXiv 2405.14191)."""
    for place, row in rows:
        asked = ask(place, field(place, row, "prompt"))
        risk = field(place, row, "risk_type")
        yield Example(
            asked, "", category=risk, groups=_groups((ATTACK, _s_eval_attack(place, row)))
        )


def _s_eval_attack(place: str, row: dict) -> str:
    """Returns the attack that `ext` names, JSON in a text; "" for a base prompt."""
    ext = row.get("ext")
    if isinstance(ext, str) and ext.strip():
        try:
            ext = parse_json(ext)
        except ValueError:
            raise SourceError(f"{place}: 'ext' is no JSON: {shorten(ext)}.") from None
    if ext and not isinstance(ext, dict):
        raise SourceError(f"{place}: 'ext' must be a JSON object, found {shorten(ext)}.")
    return optional(place, ext, "category") if ext else ""


def _alert(rows: Rows) -> Iterable[Example]:
    """Yields prompts by micro category and area (Tedeschi et al., 2024, arXiv 2404.08676).

    The instruction's wrapper is taken off: the model's own chat template takes its place.
    """
    for place, row in rows:
        text, category = field(place, row, "prompt"), field(place, row, "category")
        area = next((a for a in ALERT_AREAS if category.startswith(f"{a}_")), "")
        if not area:
            raise SourceError(
                f"{place}: 'category' must begin with one of {', '.join(ALERT_AREAS)} and '_', "
                f"found {shorten(category)}."
            )
        wrapped = _WRAPPED.fullmatch(text)
        groups = _groups((AREA, area), (ATTACK, optional(place, row, "attack_type")))
        asked = ask(place, wrapped[1] if wrapped else text)
        yield Example(asked, "", category=category, groups=groups)


def _safety_prompts(rows: Rows) -> Iterable[Example]:
    """Yields Chinese prompts by scenario or instruction attack (Sun et al., arXiv 2304.10436): an
    object of lists by name, or rows of `prompt` and `type`. Answers of the file are not kept."""
    for place, row in rows:
        if "prompt" in row:
            yield _safety_prompt(place, row, field(place, row, "type"))
            continue
        for name, items in row.items():
            if not isinstance(items, list):
                raise SourceError(f"{place}: '{name}' must be a list, found {shorten(items)}.")
            for number, item in enumerate(items):
                where = f"{place}: '{name}' item {number}"
                if not isinstance(item, dict):
                    raise SourceError(f"{where}: expected an object, found {shorten(item)}.")
                yield _safety_prompt(where, item, name)


def _safety_prompt(place: str, row: dict, name: str) -> Example:
    attack = name in SAFETY_PROMPTS_ATTACKS
    groups = _groups((ATTACK, name if attack else ""))
    asked = ask(place, field(place, row, "prompt"))
    return Example(asked, "", category="" if attack else name, language="zh", groups=groups)


def _sorry_bench(rows: Rows) -> Iterable[Example]:
    """Yields requests by category and style (Xie et al., 2024, arXiv 2406.14598).

    `turns` is a list of one request; a style is "base" or one of twenty linguistic mutations.
    """
    for place, row in rows:
        turns = row.get("turns")
        if not isinstance(turns, list) or len(turns) != 1:
            raise SourceError(f"{place}: 'turns' must be a list of one, found {shorten(turns)}.")
        asked = ask(place, field(place, {"turns": turns[0]}, "turns"))
        style = optional(place, row, "prompt_style") or "base"
        category = field(place, row, "category")
        language = style.removeprefix("translate-") if style.startswith("translate-") else "en"
        groups = _groups((STYLE, style))
        yield Example(asked, "", category=category, language=language, groups=groups)


def _groups(*pairs: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    """Returns the pairs that have a name."""
    return tuple(pair for pair in pairs if pair[1])


BENCHMARKS: dict[str, Callable[[Rows], Iterable[Example]]] = {
    "harmbench": _harmbench,
    "strongreject": functools.partial(
        _simple, prompt=("forbidden_prompt",), category=("category",)
    ),
    "jailbreakbench": functools.partial(_simple, prompt=("Goal",), category=("Category",)),
    "malicious_instruct": functools.partial(_simple, prompt=("prompt",), category=("category",)),
    "do_not_answer": _do_not_answer,
    "s_eval": _s_eval,
    "alert": _alert,
    "safety_prompts": _safety_prompts,
    "or_bench": functools.partial(_simple, prompt=("prompt",), category=("category",)),
    "sorry_bench": _sorry_bench,
}
