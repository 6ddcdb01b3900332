"""Sources: a local file in its upstream format, or a Hub data set, becomes typed examples.

A source is written `name:location`, such as `dolly:dolly/databricks_dolly_sample.csv`. A location
is a file below `data_dir` (json, jsonl, csv, txt; optionally .gz or .zip) or, when `data_dir` is
`hub`, a dataset id that the `datasets` library loads. `package/FILE` is a file of the packaged demo
set. A location may end in `#clients`, `#server`, `#train` (both) or `#heldout`: disjoint parts of
the source by a hash of the prompt, so that no prompt is on two sides.
"""

import csv
import gzip
import hashlib
import importlib.resources
import io
import json
import pathlib
import zipfile

from fedsafe_jax.data.examples import Example, SourceError
from fedsafe_jax.data.readers import READERS

PARTS = {
    "clients": ("clients",),
    "server": ("server",),
    "train": ("clients", "server"),
    "heldout": ("heldout",),
}


def read_rows(location: str, data_dir: str) -> list[tuple[str, dict]]:
    """Reads the rows of a file or of a Hub data set.

    Args:
      location: file below `data_dir`, `package/FILE`, or Hub id.
      data_dir: folder of the files, or `hub`.

    Returns:
      `(place, row)` pairs, `place` to name in an error.

    Raises:
      SourceError: the file is missing, empty, of an unknown kind, or a line does not parse.
    """
    if location.startswith("package/"):
        folder = importlib.resources.files("fedsafe_jax") / "assets" / "demo"
        path = pathlib.Path(str(folder)) / location.removeprefix("package/")
    elif data_dir == "hub":
        return _hub_rows(location)
    else:
        path = pathlib.Path(data_dir) / location
    if not path.is_file():
        raise SourceError(
            f"{path}: no such file. Give data_dir the folder that holds '{location}', "
            "or data_dir='hub' to load it from the Hub."
        )
    name, text = _read_text(path)
    suffix = pathlib.Path(name).suffix
    if suffix == ".csv":
        rows = [
            (f"{path} row {i}", row) for i, row in enumerate(csv.DictReader(io.StringIO(text)), 2)
        ]
    elif suffix == ".txt":
        lines = enumerate(text.splitlines(), 1)
        rows = [(f"{path} line {i}", {"prompt": line}) for i, line in lines if line.strip()]
    elif suffix in (".json", ".jsonl"):
        rows = _json_rows(path, text)
    else:
        raise SourceError(f"{path}: expected .json, .jsonl, .csv or .txt, found '{suffix}'.")
    if not rows:
        raise SourceError(f"{path}: the dataset is empty; it needs at least one example.")
    return rows


def _read_text(path: pathlib.Path) -> tuple[str, str]:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            members = [m for m in archive.namelist() if not m.startswith("__MACOSX")]
            return members[0], archive.read(members[0]).decode("utf-8")
    if path.suffix == ".gz":
        return path.stem, gzip.decompress(path.read_bytes()).decode("utf-8")
    return path.name, path.read_text(encoding="utf-8")


def _json_rows(path: pathlib.Path, text: str) -> list[tuple[str, dict]]:
    if text.lstrip().startswith("["):
        try:
            return [(f"{path} item {i}", row) for i, row in enumerate(json.loads(text))]
        except json.JSONDecodeError as error:
            raise SourceError(f"{path} line {error.lineno}: not JSON ({error.msg}).") from error
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            start = line if len(line) <= 60 else line[:57] + "..."
            raise SourceError(
                f"{path} line {number}: not JSON ({error.msg}): {start!r}. "
                "Each line must hold one JSON object."
            ) from error
        if not isinstance(row, dict):
            raise SourceError(f"{path} line {number}: expected a JSON object, found {row!r:.60}.")
        rows.append((f"{path} line {number}", row))
    return rows


def _hub_rows(dataset_id: str) -> list[tuple[str, dict]]:
    """Loads the training split of a Hub data set."""
    import datasets

    try:
        data = datasets.load_dataset(dataset_id, split="train")
    except Exception as error:  # The library raises exceptions of many unrelated types.
        raise SourceError(f"Hub dataset '{dataset_id}' could not be loaded: {error}") from error
    return [(f"{dataset_id} row {i}", dict(row)) for i, row in enumerate(data)]


def part_of(prompt: str) -> str:
    """Returns the part of a prompt: `heldout` (a tenth), `clients` or `server` (half of the rest).

    A hash of the prompt decides, so that the parts stay the same in every run and on every machine.
    """
    digest = hashlib.sha256(prompt.encode()).digest()
    if digest[0] % 10 == 0:
        return "heldout"
    return "clients" if digest[1] % 2 else "server"


def parse_source(source: str) -> tuple[str, str, str]:
    """Splits `name:location#part` into its three parts, `part` being "" where there is none.

    Raises:
      SourceError: an unknown name or part; the message lists the known ones.
    """
    name, _, location = source.partition(":")
    location, _, part = location.partition("#")
    if name not in READERS or not location:
        known = ", ".join(sorted(READERS))
        raise SourceError(f"source {source!r}: expected NAME:LOCATION with NAME one of {known}.")
    if part and part not in PARTS:
        raise SourceError(f"source {source!r}: part {'#' + part!r} is not one of {sorted(PARTS)}.")
    return name, location, part


def load(source: str, data_dir: str) -> list[Example]:
    """Reads the examples of one source, each marked with the reader's name.

    Args:
      source: `name:location` or `name:location#part`.
      data_dir: folder of the location, or `hub`.

    Raises:
      SourceError: the source cannot be read; the message names the file, line or field at fault.
    """
    name, location, part = parse_source(source)
    examples = list(READERS[name](read_rows(location, data_dir)))
    if part:
        examples = [e for e in examples if part_of(e.prompt) in PARTS[part]]
    if not examples:
        raise SourceError(f"{location}: the dataset is empty; it needs at least one example.")
    return [example._replace(source=name) for example in examples]
