"""Sources: a local file in its upstream format, or a Hub data set, becomes typed examples.

A source is written `name:location`, such as `dolly:dolly/databricks_dolly_sample.csv`. A location
is a file below `data_dir` (json, jsonl, csv, txt; optionally .gz or .zip), `package/FILE` for a
file of the packaged demo set, or `hub:owner/name[config]/split@revision` for a data set of the Hub,
which the `datasets` library loads; where `data_dir` is `hub`, `hub:` may be left out. All kinds may
stand beside each other. A location may end in `#clients`, `#server`, `#train` (both) or `#heldout`:
disjoint parts of the source by a hash of the first user turn, so that no prompt and no conversation
is on two sides. `#without=CATEGORY+CATEGORY` leaves categories out, as a policy that allows such
requests does.
"""

import contextlib
import hashlib
import importlib.resources
import os
import pathlib
import re
from collections.abc import Iterator, Sequence

from fedsafe_jax.data.catalog import sets_at
from fedsafe_jax.data.examples import Example, SourceError
from fedsafe_jax.data.hub_rows import PREFIX, is_on_hub, parse_location, read_hub_rows
from fedsafe_jax.data.packed_files import READABLE
from fedsafe_jax.data.readers import READERS
from fedsafe_jax.data.text_files import (
    check_amount,
    csv_rows,
    one_line,
    parse_json,
    read_text,
    shorten,
)

PARTS = {
    "clients": ("clients",),
    "server": ("server",),
    "train": ("clients", "server"),
    "heldout": ("heldout",),
}
WITHOUT = "without="
# Names of the list of rows in a JSON file that is one object.
LISTS = ("data", "rows", "examples", "train", "instances")


def read_rows(location: str, data_dir: str) -> list[tuple[str, dict]]:
    """Reads the rows of a file or of a Hub data set.

    Args:
      location: file below `data_dir`, `package/FILE`, or data set of the Hub.
      data_dir: folder of the files, or `hub`.

    Returns:
      `(place, row)` pairs, `place` to name in an error.

    Raises:
      SourceError: the file is missing, empty, of an unknown kind, or a line does not parse.
    """
    path = _path_of(location, data_dir)
    if path is None:
        return read_hub_rows(location)
    if os.path.exists(path) and not os.path.isfile(path):
        raise SourceError(f"{path}: is no regular file; give a file with text.")
    with quoting_no_other_file(location, data_dir):
        return _file_rows(path, location)


def _path_of(location: str, data_dir: str) -> pathlib.Path | None:
    """The file of a location; None for one of the Hub."""
    if location.startswith("package/"):
        folder = importlib.resources.files("fedsafe_jax") / "assets" / "demo"
        name = location.removeprefix("package/")
        # A site may allow the packaged files alone to whoever writes the config.
        if ".." in pathlib.PurePath(name).parts or pathlib.PurePath(name).is_absolute():
            raise SourceError(f"{location}: leads out of the packaged files; name one of them.")
        return pathlib.Path(str(folder)) / name
    return None if is_on_hub(location, data_dir) else pathlib.Path(data_dir) / location


@contextlib.contextmanager
def quoting_no_other_file(location: str, data_dir: str) -> Iterator[None]:
    """Takes the words of a file out of errors about it, where it is a link to somewhere else.

    Fetched data may hold a link to a file that is none of its own, such as one with a key; a link
    is followed, as operators have their own, but what it leads to is quoted nowhere. A location
    that is absolute, or has "..", was written by whoever wrote the config: its file is quoted.

    Args:
      location, data_dir: see `read_rows`.

    Raises:
      SourceError: as raised within, or with the place alone.
    """
    try:
        yield
    except SourceError as error:
        path = _path_of(location, data_dir)
        if path is None or not _is_link_out(path, location, data_dir):
            raise
        place = re.match(re.escape(str(path)) + r"(?: (?:line|row|item) \d{1,9})?", str(error))
        raise SourceError(
            f"{place[0] if place else path}: cannot be read as this source. It is a link out of "
            f"{data_dir}, to {path.resolve()}, so nothing of it is shown; a copy in its place "
            "would be."
        ) from None


def _is_link_out(path: pathlib.Path, location: str, data_dir: str) -> bool:
    given = pathlib.PurePath(location)
    folder = path.parent if given.is_absolute() or ".." in given.parts else pathlib.Path(data_dir)
    if location.startswith("package/") or not os.path.exists(path):
        return False
    return not path.resolve().is_relative_to(folder.resolve())


def _file_rows(path: pathlib.Path, location: str) -> list[tuple[str, dict]]:
    """Reads the rows of a file; see `read_rows`."""
    if not os.path.isfile(path):
        names = " ".join(sets_at(location))
        get = f" `fedsafe fetch-data {names} --data_dir=DIR` downloads it." if names else ""
        raise SourceError(
            f"{path}: no such file. Give data_dir the folder that holds '{location}', "
            f"or write hub:OWNER/NAME to load it from the Hub.{get}"
        )
    name, text = read_text(path)
    try:
        check_amount(text)
    except ValueError as error:
        raise SourceError(f"{path}: {error}.") from None
    suffix = pathlib.Path(name).suffix
    if suffix == ".csv":
        rows: list = csv_rows(path, text)
    elif suffix == ".txt":
        # Other separators of lines that Unicode knows are text within a prompt.
        lines = enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1)
        rows = [(f"{path} line {i}", {"prompt": line}) for i, line in lines if line.strip()]
    elif suffix in (".json", ".jsonl"):
        rows = _json_rows(path, text)
    else:
        raise SourceError(f"{path}: expected {', '.join(READABLE)}, found {suffix!r}.")
    if not rows:
        raise SourceError(f"{path}: the dataset is empty; it needs at least one example.")
    return rows


def _json_rows(path: pathlib.Path, text: str) -> list[tuple[str, dict]]:
    """Reads a JSON list of rows, such a list in an object, or JSON lines."""
    start = text.lstrip()[:1]
    if start == "[":
        try:
            return _items(path, parse_json(text))
        except ValueError as error:
            if isinstance(error, SourceError):
                raise
            line = f" line {error.lineno}" if hasattr(error, "lineno") else ""
            words = getattr(error, "msg", one_line(error))
            raise SourceError(f"{path}{line}: not JSON ({words}).") from None
    if start == "{":
        try:
            whole = parse_json(text)
        except ValueError:  # JSON lines, most likely
            pass
        else:
            listed = {n: v for n, v in whole.items() if n in LISTS and _is_rows(v)}
            others = [n for n, v in whole.items() if n not in listed and _is_rows(v)]
            if len(listed) == 1 and not others:
                return _items(path, next(iter(listed.values())))
            if listed:
                names = ", ".join(map(repr, [*listed, *others]))
                raise SourceError(
                    f"{path}: holds several lists of rows ({names}); give each a file of its own."
                )
            return [(f"{path} line 1", whole)]
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise SourceError(
                f"{path} line {number}: not JSON ({getattr(error, 'msg', one_line(error))}): "
                f"{shorten(line)}. Each line must hold one JSON object."
            ) from None
        if not isinstance(row, dict):
            raise SourceError(
                f"{path} line {number}: expected a JSON object, found {shorten(row)}."
            )
        rows.append((f"{path} line {number}", row))
    return rows


def _is_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


def _items(path: pathlib.Path, items: list) -> list[tuple[str, dict]]:
    for number, item in enumerate(items):
        if not isinstance(item, dict):
            raise SourceError(
                f"{path} item {number}: expected a JSON object, found {shorten(item)}. "
                "Prompts alone may be a .txt file with one in each line."
            )
    return [(f"{path} item {i}", row) for i, row in enumerate(items)]


def part_of(prompt: str) -> str:
    """Returns the part of a prompt: `heldout` (a tenth), `clients` or `server` (half of the rest).

    A hash of the prompt decides, so that the parts stay the same in every run and on every machine.
    Of a dialogue the first user turn is given (`Example.opening`): its later turns and its other
    answers then lie in the same part.
    """
    digest = hashlib.sha256(prompt.encode()).digest()
    if digest[0] % 10 == 0:
        return "heldout"
    return "clients" if digest[1] % 2 else "server"


def parse_source(source: str) -> tuple[str, str, str]:
    """Splits `name:location#part` into its three parts, `part` being "" where there is none.

    Raises:
      SourceError: an unknown name or part; the message lists the known ones. Or a location of the
        Hub that is not written as one.
    """
    name, _, location = source.partition(":")
    location, _, part = location.partition("#")
    if name not in READERS or not location:
        known = ", ".join(sorted(READERS))
        raise SourceError(f"source {source!r}: expected NAME:LOCATION with NAME one of {known}.")
    if part and part not in PARTS and not part.startswith(WITHOUT):
        raise SourceError(f"source {source!r}: part {'#' + part!r} is not one of {sorted(PARTS)}.")
    if location.startswith(PREFIX):
        parse_location(location)
    return name, location, part


def load(source: str, data_dir: str) -> list[Example]:
    """Reads the examples of one source, each marked with the reader's name.

    Args:
      source: `name:location` or `name:location#part`.
      data_dir: folder of the location, or `hub`.

    Raises:
      SourceError: the source cannot be read; the message names the file, line or field at fault.
    """
    return _load(source, data_dir)[0]


def load_answered(source: str, data_dir: str) -> tuple[list[Example], list[Example]]:
    """Reads the examples of a source that have an answer, as training needs.

    Args:
      source, data_dir: see `load`.

    Returns:
      `(answered, blank)`; `blank` are those whose answer is blank, to be left out and counted.

    Raises:
      SourceError: as `load`, and where no example has an answer.
    """
    examples, fields = _load(source, data_dir)
    answered = [e for e in examples if e.response.strip()]
    if not answered:
        name, _, _ = parse_source(source)
        raise SourceError(
            f"source '{source}': none of its {len(examples)} examples has an answer (response, "
            f"output, or a last assistant turn), which training needs. Found the fields "
            f"{shorten(fields, 200)}; the reader '{name}' may be the wrong one."
        )
    return answered, [e for e in examples if not e.response.strip()]


def _load(source: str, data_dir: str) -> tuple[list[Example], Sequence[str]]:
    """Returns the examples of a source, and the names of its first row's fields."""
    name, location, part = parse_source(source)
    rows = read_rows(location, data_dir)
    with quoting_no_other_file(location, data_dir):
        examples = list(READERS[name](rows))
    if not examples:
        raise SourceError(f"{location}: the reader '{name}' finds no example in {len(rows)} rows.")
    if part.startswith(WITHOUT):
        examples = _without(location, examples, part.removeprefix(WITHOUT).split("+"))
    elif part:
        read = len(examples)
        examples = [e for e in examples if part_of(e.opening) in PARTS[part]]
        if not examples:
            raise SourceError(f"{location}: none of its {read} examples is in the part '#{part}'.")
    return [example._replace(source=name) for example in examples], sorted(rows[0][1])


def _without(location: str, examples: list[Example], names: Sequence[str]) -> list[Example]:
    """Leaves out the examples of some categories, each of which must be there."""
    known = sorted({example.category for example in examples})
    if unknown := sorted(set(names) - set(known)):
        raise SourceError(
            f"{location}: '#{WITHOUT}{'+'.join(names)}': no example is of the category "
            f"{shorten(unknown[0])}; known are {', '.join(map(repr, known))}."
        )
    left = [example for example in examples if example.category not in names]
    if not left:
        raise SourceError(f"{location}: '#{WITHOUT}{'+'.join(names)}' leaves no example.")
    return left
