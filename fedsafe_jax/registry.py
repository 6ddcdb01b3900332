"""Entries of a registry by their names, and the error of a name that is not on it."""

import difflib
from collections.abc import Collection, Mapping
from typing import TypeVar

Entry = TypeVar("Entry")


class UnknownNameError(ValueError):
    """A name is on no entry of its registry; the message has the nearest one."""


def unknown(field: str, name: object, allowed: Collection[str]) -> str:
    """Says that a name is not one of those that a field may have, and which one is near.

    Args:
      field: field or argument that has the name.
      name: what was found.
      allowed: names that are expected; "" stands for none.
    """
    near = difflib.get_close_matches(str(name), allowed, 1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    names = ", ".join(one or "'' (none)" for one in allowed)
    return f"{field}: {name!r} is not one of {names}.{hint}"


def look_up(registry: Mapping[str, Entry], name: str, field: str) -> Entry:
    """Returns the entry of a name.

    Args:
      registry: entries by name.
      name: name of the entry.
      field: field or argument that has the name, for the message.

    Raises:
      UnknownNameError: the registry has no such name.
    """
    if name not in registry:
        raise UnknownNameError(unknown(field, name, registry))
    return registry[name]
