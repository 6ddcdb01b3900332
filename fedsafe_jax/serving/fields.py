"""The fields of a request's JSON: each is taken once, checked, and what is left over is unknown."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from fedsafe_jax.serving.errors import malformed

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# They say who asks, or how it is kept, and no answer depends on them.
UNUSED = {"metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"}
# Fields that are not served, with the values that ask for nothing.
NEUTRAL: Mapping[str, tuple] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "best_of": (1,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}


def read_json(body: bytes) -> dict[str, Any]:
    """Reads the body of a request.

    Raises:
      ApiError: it is no JSON object.
    """
    try:
        content = json.loads(body)
    except RecursionError:
        raise malformed("The body is nested too deeply.") from None
    except ValueError as error:
        raise malformed(f"The body is no JSON: {str(error)[:200]}.") from None
    if not isinstance(content, dict):
        raise malformed(f"The body must be a JSON object, not {shown(content)}.")
    return content


class Fields:
    """The fields of a request; each is taken once, and what is left over is unknown."""

    def __init__(self, content: dict[str, Any]):
        # A client's library writes null for what is not given.
        self._left = {name: value for name, value in content.items() if value is not None}

    def take(self, name: str) -> Any:
        """Returns a field that has to be there; raises `ApiError` where it is not."""
        if name not in self._left:
            raise malformed(f"'{name}' is missing.", name)
        return self._left.pop(name)

    def typed(self, name: str, default: Any, fits: Callable[[Any], bool], what: str) -> Any:
        """Returns a field of a kind.

        Args:
          name: the field.
          default: what is returned where it is not given.
          fits: whether a value is of the kind.
          what: the kind in words.

        Raises:
          ApiError: it is of another kind.
        """
        if name not in self._left:
            return default
        value = self._left.pop(name)
        if not fits(value):
            raise malformed(f"'{name}' must be {what}, not {shown(value)}.", name)
        return value

    def flag(self, name: str) -> bool:
        """Returns a field that is true or false, false unless given."""
        return self.typed(name, False, lambda x: isinstance(x, bool), what="true or false")

    def whole(self, name: str, default: int | None, least: int, most: int = 2**31 - 1) -> Any:
        """Returns a whole number from `least` to `most`, or the default."""

        def fits(value):
            return is_whole(value) and least <= value <= most

        return self.typed(name, default, fits, what=f"a whole number from {least} to {most}")

    def number(self, name: str, default: float, fits: Callable, what: str) -> float:
        """Returns a finite number that fits; arguments as in `typed`."""

        def sound(value):
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            return is_number and abs(value) < 1e9 and math.isfinite(value) and fits(value)

        return float(self.typed(name, default, sound, what=f"a number, {what}"))

    def check_rest(self, before: str = "") -> None:
        """Checks that what is left asks for nothing.

        Args:
          before: what stands before the names, in messages.

        Raises:
          ApiError: a field is unknown, or not served.
        """
        for name, value in self._left.items():
            if not before and name in UNUSED:
                continue
            if name not in NEUTRAL:
                raise malformed(f"Unknown field '{before}{name[:60]}'.", f"{before}{name[:60]}")
            if value not in NEUTRAL[name]:
                raise malformed(
                    f"'{name}' is not served; leave it out.", name, code="unsupported_parameter"
                )


def is_whole(value: Any) -> bool:
    """Returns whether a value of JSON is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def shown(value: Any) -> str:
    """Returns a value as messages show it, in a few letters."""
    return f"{value!r:.60}" if not isinstance(value, (dict, list)) else type(value).__name__


def check_text(text: Any, where: str) -> None:
    """Checks that a value is a text of whole characters.

    Args:
      text: the value.
      where: its place, such as "prompt[0]".

    Raises:
      ApiError: it is none.
    """
    param = where.partition("[")[0]
    if not isinstance(text, str):
        raise malformed(f"'{where}' must be a text, not {shown(text)}.", param)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise malformed(
            f"'{where}' holds half a surrogate pair; no UTF-8 text has one.", param
        ) from None


def read_turn(given: Any, where: str) -> tuple[str, str]:
    """Returns (role, text) of a message.

    Args:
      given: the message.
      where: its place, such as "messages[0]".

    Raises:
      ApiError: it is none, or holds what is no text.
    """
    param = where.partition("[")[0]
    if not isinstance(given, dict):
        raise malformed(f"'{where}' must be {{role, content}}, not {shown(given)}.", param)
    role, content = given.get("role"), given.get("content")
    if not isinstance(role, str) or role not in ROLES:
        names = ", ".join(ROLES)
        raise malformed(f"'{where}.role' must be one of {names}, not {shown(role)}.", param)
    unknown = {k for k, v in given.items() if v is not None} - {"role", "content", "name"}
    if unknown:
        name = min(map(str, unknown))[:60]
        raise malformed(f"'{where}.{name}' is not served; leave it out.", param)
    if isinstance(content, list):
        parts = []
        for i, part in enumerate(content):
            if not isinstance(part, dict) or part.get("type") != "text":
                raise malformed(f"'{where}.content[{i}]' must be of type 'text'.", param)
            check_text(part.get("text"), f"{where}.content[{i}].text")
            parts.append(part["text"])
        content = "".join(parts)
    check_text(content, f"{where}.content")
    return ROLES[role], content
