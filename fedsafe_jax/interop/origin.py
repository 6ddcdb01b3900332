"""What a file of answers says about where they come from, and how its rows are told apart."""

import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Origin(NamedTuple):
    """Whose answers the rows of one task are.

    Attributes:
      task: name of the task.
      model: the model's name.
      version: version of the task, 0 for none.
      source: where its items come from; "" where it is not known.
      settings: how the answers were generated, such as `max_new_tokens`; what is not known is not
        there.
      facts: what else is known, ready for JSON, such as the adapter's hash.
      tags: words that logs are found by, such as the arm.
      packages: versions of what made them.
    """

    task: str
    model: str
    version: int = 0
    source: str = ""
    settings: Mapping[str, Any] = {}
    facts: Mapping[str, Any] = {}
    tags: tuple[str, ...] = ()
    packages: Mapping[str, str] = {}


def numbered(rows: Sequence[dict]) -> list[tuple[int | str, int]]:
    """Returns of each row the name of its item, and which answer to it this is, from 1.

    Where a task has several rows for an item beside its samples, such as one a depth of
    `prefilled`, those behind the first are items "3.2", "3.3".
    """
    times: dict[tuple[object, int], int] = {}
    names: list[tuple[int | str, int]] = []
    for number, row in enumerate(rows):
        item, sample = row.get("item"), row.get("sample")
        item = item if isinstance(item, int | str) else number
        sample = sample if isinstance(sample, int) and sample > 0 else 0
        times[item, sample] = times.get((item, sample), 0) + 1
        again = times[item, sample]
        names.append((item if again == 1 else f"{item}.{again}", sample + 1))
    return names


def value_of(verdict: Mapping[str, Any]) -> float:
    """Returns a verdict as a number: 1 for refused or harmless and 0 for not, or the rating."""
    refused = verdict["refused"]
    return float(verdict["score"] if refused is None else refused)


def specs_of(rows: Sequence[dict]) -> list[str]:
    """Returns the specs of the judges that any row has a verdict of, in the order of the rows."""
    return list(dict.fromkeys(spec for row in rows for spec in row.get("verdicts") or {}))


def short_hash(*parts: object) -> str:
    """Returns 22 hexadecimal digits that tell contents apart, as long as inspect's identifiers."""
    text = json.dumps(parts, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:22]


def now() -> datetime.datetime:
    """Returns the time in UTC, in whole seconds."""
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)
