"""Upstream's wordings of rubrics, packaged unchanged with their sources and licences."""

import functools
import importlib.resources
import json


@functools.cache
def packaged() -> dict[str, dict[str, str]]:
    """Returns `{name: {"source", "licence", "system", "user"}}`; `user` is a format of fields."""
    file = importlib.resources.files("fedsafe_jax") / "assets" / "judge_rubrics.json"
    return json.loads(file.read_text(encoding="utf-8"))


def conversation(name: str, **fields: str) -> list[dict]:
    """Returns the conversation of a wording.

    Args:
      name: name of the wording.
      **fields: texts of its fields; braces in them stay as they are.
    """
    wording = packaged()[name]
    return [
        {"role": "system", "content": wording["system"]},
        {"role": "user", "content": wording["user"].format(**fields)},
    ]
