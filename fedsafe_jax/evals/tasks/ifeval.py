"""IFEval (Zhou et al., 2023, arXiv 2311.07911): instructions that a program can check.

Accuracies are upstream's (`evaluation_lib.py`): of prompts whose instructions are all followed and
of single instructions, strict and loose. How each instruction is checked is `evals.instructions`.
"""

import inspect
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedsafe_jax.data import sources
from fedsafe_jax.data.examples import Example, SourceError
from fedsafe_jax.data.refusals import spoken
from fedsafe_jax.data.row_fields import ask as ask_prompt
from fedsafe_jax.data.row_fields import field
from fedsafe_jax.data.text_files import shorten
from fedsafe_jax.evals import answers, statistics
from fedsafe_jax.evals.instructions import CHECKERS, NOT_CHECKABLE, follows, loosely_follows
from fedsafe_jax.evals.task import Column, EvalOptions, Task
from fedsafe_jax.inference.language_model import LanguageModel
from fedsafe_jax.registry import unknown


class Prompt(NamedTuple):
    """One prompt with its instructions: ids, and the arguments of each by name."""

    text: str
    instructions: tuple[str, ...]
    arguments: tuple[dict, ...]


def load(location: str, data_dir: str) -> list[Prompt]:
    """Reads `input_data.jsonl`: rows of `prompt`, `instruction_id_list` and `kwargs`.

    Arguments that are null, as copies of the file have them, are left out.

    Raises:
      SourceError: the file is missing, or a row names an unknown instruction or other arguments.
    """
    prompts = []
    for place, row in sources.read_rows(location, data_dir):
        ids, given = row.get("instruction_id_list"), row.get("kwargs")
        if not (isinstance(ids, list) and isinstance(given, list) and 0 < len(ids) == len(given)):
            raise SourceError(
                f"{place}: 'instruction_id_list' and 'kwargs' must be lists of the same length."
            )
        arguments = tuple(
            _arguments(place, name, kwargs) for name, kwargs in zip(ids, given, strict=True)
        )
        prompts.append(Prompt(field(place, row, "prompt"), tuple(ids), arguments))
    return prompts


def _arguments(place: str, name: str, given: object) -> dict:
    """Returns the arguments of an instruction, checked against its checker."""
    if name not in CHECKERS and name not in NOT_CHECKABLE:
        raise SourceError(f"{place}: {unknown('instruction', name, CHECKERS)}")
    if not isinstance(given, dict | None):
        raise SourceError(f"{place}: 'kwargs' of '{name}' must be an object, not {shorten(given)}.")
    arguments = {key: value for key, value in (given or {}).items() if value is not None}
    if name in NOT_CHECKABLE:
        return arguments
    expected = list(inspect.signature(CHECKERS[name]).parameters)[1:]
    if sorted(arguments) != sorted(expected):
        raise SourceError(
            f"{place}: '{name}' needs the arguments {expected}, found {sorted(arguments)}."
        )
    try:  # before anything is generated: a wrong pattern or type would show at the end
        follows(name, arguments, "Yes.")
    except (re.error, ValueError, TypeError, AttributeError) as error:
        raise SourceError(f"{place}: the arguments of '{name}' do not fit ({error}).") from None
    return arguments


def ask(lm: LanguageModel, prompts: Sequence[Prompt], options: EvalOptions) -> list[dict]:
    """Returns the answers, each with its instructions and their arguments."""
    requests = [Example(ask_prompt(prompt.text, prompt.text), "") for prompt in prompts]
    rows = answers.ask(lm, requests, options)
    for row in rows:
        prompt = prompts[row["item"]]
        row |= {"instructions": list(prompt.instructions), "arguments": list(prompt.arguments)}
    return rows


def score(rows: Sequence[dict], options: EvalOptions) -> dict:
    """Returns which instructions each answer follows; of several samples the first is scored.

    Returns:
      `{"strict": [[bool or None] a prompt], "loose": as that, "instructions": [[id] a prompt],
      "unfinished": int, "samples": [...]}`; None where an instruction is not checkable.
    """
    del options
    first = [row for row in rows if not row.get("sample")]
    outcome = {"strict": [], "loose": [], "instructions": [row["instructions"] for row in first]}
    for row in first:
        said = spoken(row["answer"])
        checks = list(zip(row["instructions"], row["arguments"], strict=True))
        outcome["strict"].append([follows(name, kwargs, said) for name, kwargs in checks])
        outcome["loose"].append([loosely_follows(name, kwargs, said) for name, kwargs in checks])
    outcome["unfinished"] = sum(not row["finished"] for row in first)
    return outcome | {"samples": answers.samples(rows)}


def _prompts(followed: Sequence[Sequence[bool | None]]) -> list[bool | None]:
    """Returns whether all instructions of each prompt are followed; None where one is open."""
    return [None if None in checks else all(checks) for checks in followed]


def summarise(outcomes: Sequence[dict], options: EvalOptions) -> dict:
    """Returns the four accuracies in percent, and the strict one of each kind of instruction.

    Returns:
      `prompt_strict`, the headline, `prompt_loose`, `instruction_strict`, `instruction_loose`;
      `by_instruction`; `n` prompts and `n_instructions`, `not_checkable` instructions (left out,
      with their prompts, which are left out of the prompts' accuracies alone), and `unfinished`.
    """
    del options
    summary = {}
    for kind in ("strict", "loose"):
        prompts = [_prompts(o[kind]) for o in outcomes]
        rate, interval = statistics.rate(prompts)
        summary |= {f"prompt_{kind}": rate, f"prompt_{kind}_ci95": interval}
        single = np.array([sum(o[kind], []) for o in outcomes], float)  # None becomes NaN
        rate, interval = statistics.rate(single)
        summary |= {f"instruction_{kind}": rate, f"instruction_{kind}_ci95": interval}
        summary |= {"n": statistics.complete(prompts).shape[1]} if kind == "strict" else {}
        if kind == "strict":
            strict = single
    names = np.array(sum(outcomes[0]["instructions"], []))
    by_name = {str(name): strict[:, names == name] for name in sorted(set(names))}
    return summary | {
        "n_instructions": statistics.complete(strict).shape[1],
        "not_checkable": int(np.isnan(strict[0]).sum()),
        "unfinished": outcomes[0]["unfinished"],
        "by_instruction": {
            name: {"accuracy": statistics.rate(part)[0], "n": part.shape[1]}
            for name, part in by_name.items()
        },
    }


def values(outcome: dict, options: EvalOptions) -> dict[str, list[bool | None]]:
    """Returns by prompt whether all instructions are followed, and by instruction whether it is."""
    del options
    kinds = ("strict", "loose")
    return {f"prompt_{kind}": _prompts(outcome[kind]) for kind in kinds} | {
        f"instruction_{kind}": sum(outcome[kind], []) for kind in kinds
    }


def _column(title: str, key: str) -> Column:
    return Column(title, key, "up", interval=f"{key}_ci95")


IFEVAL = Task(
    name="ifeval",
    version=1,
    title="prompts with checkable instructions",
    source="ifeval/input_data.jsonl",
    columns=(
        _column("IFEval prompts", "prompt_strict"),
        _column("IFEval prompts, loose", "prompt_loose"),
        _column("IFEval instructions", "instruction_strict"),
        _column("IFEval instructions, loose", "instruction_loose"),
    ),
    load=load,
    prompts=lambda prompts: [prompt.text for prompt in prompts],
    ask=ask,
    score=score,
    summarise=summarise,
    values=values,
)
