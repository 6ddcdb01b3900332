"""Principles of Constitutional AI, and example dialogues that show how to apply them."""

import importlib.resources
import os
import pathlib
import re
from collections.abc import Sequence
from typing import NamedTuple

from fedsafe_jax.cai.forms import LABELS
from fedsafe_jax.data.examples import SourceError
from fedsafe_jax.data.text_files import one_line, parse_json, read_text, shorten

# Far above those in use: Anthropic's has 16 principles, of a few hundred characters each.
MOST_PRINCIPLES, MOST_CHARACTERS = 10_000, 100_000
PACKAGED = "package:constitution"
Turns = tuple[tuple[str, str], ...]  # (role, text), roles as in `forms.LABELS`


class Principle(NamedTuple):
    """One principle, as the two requests that apply it (Bai et al., 2022, arXiv 2212.08073)."""

    critique_request: str
    revision_request: str


class Constitution(NamedTuple):
    """Principles and examples of critique and revision.

    Attributes:
      principles: at least one principle.
      few_shots: example dialogues, each from a question to the revision of its answer.
      refusals: answers that take the place of revisions which are of no use; () for none.
    """

    principles: list[Principle]
    few_shots: list[Turns]
    refusals: tuple[str, ...] = ()


class ConstitutionError(ValueError):
    """The constitution file cannot be read."""


def load(path: str, few_shots: str = "") -> Constitution:
    """Reads a constitution.

    Args:
      path: a JSON file in either public form: `{"constitutions": [{"critic", "revision"}],
        "system_chat": [[{"role", "content"}]]}` (llm-swarm), to which we add `"refusals": [text]`,
        or Anthropic's `{name: {"prompt", "edit_request"}}`. `package:constitution` is the packaged
        one.
      few_shots: a JSON file in Anthropic's form, a list of texts, that replaces those in `path`.

    Raises:
      ConstitutionError: a file is missing, in another form, or holds no principle.
    """
    raw = _read(path, "cai.constitution")
    refusals: Sequence = ()
    try:
        if "constitutions" in raw:
            principles = [Principle(c["critic"], c["revision"]) for c in raw["constitutions"]]
            shots = [_from_chat(chat) for chat in raw.get("system_chat", [])]
            refusals = raw.get("refusals", [])
        else:
            principles = [
                Principle(
                    _request(c["prompt"], "Critique"), _request(c["edit_request"], "Revision")
                )
                for c in raw.values()
            ]
            shots = []
    except (TypeError, KeyError, AttributeError, IndexError) as error:
        raise ConstitutionError(
            f"{path}: expected critic/revision or prompt/edit_request."
        ) from error
    if len(principles) > MOST_PRINCIPLES or len(shots) > MOST_PRINCIPLES:
        raise ConstitutionError(
            f"{path}: {len(principles):,} principles and {len(shots):,} examples; at most "
            f"{MOST_PRINCIPLES:,} are read."
        )
    for number, principle in enumerate(principles, 1):
        _check_texts(f"{path}: principle {number}", principle)
    if not principles:
        raise ConstitutionError(f"{path}: holds no principle.")
    if not isinstance(refusals, list | tuple) or len(refusals) > MOST_PRINCIPLES:
        raise ConstitutionError(
            f"{path}: refusals is {shorten(refusals)}; expected a list of at most "
            f"{MOST_PRINCIPLES:,} texts."
        )
    for number, text in enumerate(refusals, 1):
        _check_texts(f"{path}: refusal {number}", [text])
        if not text.strip():
            raise ConstitutionError(f"{path}: refusal {number} is blank.")
    if few_shots:
        texts = _read(few_shots, "cai.few_shot_file")
        if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
            raise ConstitutionError(f"{few_shots}: expected a list of dialogues as texts.")
        for number, text in enumerate(texts):
            _check_texts(f"{few_shots}: example {number}", [text])
        shots = [parse_few_shot(text) for text in texts]
    for number, shot in enumerate(shots):
        _check_texts(f"{few_shots or path}: example {number}", [t for turn in shot for t in turn])
        if not shot or shot[-1][0] != "revision":
            raise ConstitutionError(
                f"{few_shots or path}: example {number} does not end in a revision."
            )
    return Constitution(principles, shots, tuple(refusals))


def _check_texts(place: str, texts: Sequence) -> None:
    """Checks that all that models are asked with is text of a bearable length.

    Raises:
      ConstitutionError: one is not.
    """
    for text in texts:
        if not isinstance(text, str) or len(text) > MOST_CHARACTERS:
            raise ConstitutionError(
                f"{place} holds {shorten(text)}; expected texts of at most {MOST_CHARACTERS:,} "
                "characters."
            )


def parse_few_shot(text: str) -> Turns:
    """Splits a text in Anthropic's form into turns.

    Each turn begins after an empty line with its label: "Human: ...", "CritiqueRequest: ...".
    """
    roles = {label: role for role, label in LABELS.items()}
    parts = re.split(rf"\n\n({'|'.join(roles)}):", "\n\n" + text.lstrip())[1:]
    turns = zip(parts[::2], parts[1::2], strict=True)
    return tuple((roles[label], said.strip()) for label, said in turns if said.strip())


def _from_chat(chat) -> Turns:
    """A user and assistant chat whose last four turns are critique and revision."""
    turns = [(m["role"], m["content"]) for m in chat]
    ending = ("critique_request", "critique", "revision_request", "revision")
    last = [(role, text) for role, (_, text) in zip(ending, turns[-4:], strict=False)]
    return tuple(turns[:-4] + last)


def _read(path: str, field: str):
    if path == PACKAGED:
        package = pathlib.Path(str(importlib.resources.files("fedsafe_jax")))
        file = package / "assets" / "constitution.json"
    else:
        file = pathlib.Path(path)
    if not os.path.isfile(file):
        raise ConstitutionError(f"{field}: no such file: {path}")
    try:
        return parse_json(read_text(file)[1])
    except SourceError as error:  # which is a ValueError too, and names the file
        raise ConstitutionError(f"{field}: {error}") from None
    except ValueError as error:
        raise ConstitutionError(f"{field}: {path}: not JSON ({one_line(error)}).") from None


def _request(text, kind: str) -> str:
    text = text[0] if isinstance(text, list) else text
    return text.replace(f"{kind}Request:", "").removesuffix(f"{kind}:").strip()
