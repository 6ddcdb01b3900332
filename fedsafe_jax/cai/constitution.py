"""Principles of Constitutional AI: a critique request and a revision request each."""

import importlib.resources
import json
import pathlib
from typing import NamedTuple


class Principle(NamedTuple):
    """One principle, as the two requests that apply it (Bai et al., 2022)."""

    critique_request: str
    revision_request: str


class ConstitutionError(ValueError):
    """The constitution file cannot be read."""


def load(path: str) -> list[Principle]:
    """Reads a constitution.

    Args:
      path: a JSON file in either public form: `{"constitutions": [{"critic", "revision"}]}`, or
        Anthropic's `{name: {"prompt", "edit_request"}}`. `package:constitution` is the packaged
        one.

    Raises:
      ConstitutionError: the file is missing, in another form, or empty.
    """
    if path == "package:constitution":
        file = importlib.resources.files("fedsafe_jax") / "assets" / "constitution.json"
    else:
        file = pathlib.Path(path)
    if not file.is_file():
        raise ConstitutionError(f"cai.constitution: no such file: {path}")
    raw = json.loads(file.read_text(encoding="utf-8"))
    try:
        if "constitutions" in raw:
            principles = [Principle(c["critic"], c["revision"]) for c in raw["constitutions"]]
        else:
            principles = [
                Principle(
                    _request(c["prompt"], "Critique"), _request(c["edit_request"], "Revision")
                )
                for c in raw.values()
            ]
    except (TypeError, KeyError, AttributeError) as error:
        raise ConstitutionError(
            f"{path}: expected critic/revision or prompt/edit_request."
        ) from error
    if not principles:
        raise ConstitutionError(f"{path}: holds no principle.")
    return principles


def _request(text, kind: str) -> str:
    text = text[0] if isinstance(text, list) else text
    return text.replace(f"{kind}Request:", "").removesuffix(f"{kind}:").strip()
