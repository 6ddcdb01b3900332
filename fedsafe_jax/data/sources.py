"""Named readers: a local file in its upstream format, or a Hub id, becomes typed examples.

A source is written `name:location`, such as `dolly:dolly/databricks_dolly_sample.csv`. A location
is a file below `data_dir` (json, jsonl, csv, txt; optionally .gz or .zip) or, when `data_dir` is
`hub`, a dataset id that the `datasets` library loads. `package/FILE` is a file of the packaged demo
set. A location may end in `#clients`, `#server`, `#train` (both) or `#heldout`: disjoint parts of
the source by a hash of the prompt, so that no prompt is on two sides.
"""

import csv
import functools
import gzip
import hashlib
import importlib.resources
import io
import json
import pathlib
import zipfile
from collections.abc import Callable, Iterable
from typing import NamedTuple

SAFE, UNSAFE, UNKNOWN = "safe", "unsafe", "unknown"
# Benchmarks: they may be evaluated on, never trained on.
EVALUATION_ONLY = ("advbench", "hhh")
PARTS = {
    "clients": ("clients",),
    "server": ("server",),
    "train": ("clients", "server"),
    "heldout": ("heldout",),
}


class SourceError(ValueError):
    """A data source cannot be read; the message names the file and line."""


class Example(NamedTuple):
    """One dialogue that ends in a user turn, and its answer."""

    messages: tuple[tuple[str, str], ...]  # (role, text); the last role is "user"
    response: str  # "" where the source has none
    label: str = UNKNOWN  # safety of the response in its dialogue: safe, unsafe or unknown
    source: str = ""
    user: str = ""  # who holds it, for a partition by user
    category: str = ""
    language: str = ""

    @property
    def prompt(self) -> str:
        """Text of the last user turn."""
        return self.messages[-1][1]


class Choice(NamedTuple):
    """A comparison of two answers to one dialogue (HHH)."""

    messages: tuple[tuple[str, str], ...]
    better: str
    worse: str
    category: str


def read_rows(location: str, data_dir: str) -> list[tuple[str, dict]]:
    """Rows of a file or Hub dataset, each with the place to name in an error.

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


def _json_rows(path, text):
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
            found = line if len(line) <= 60 else line[:57] + "..."
            raise SourceError(
                f"{path} line {number}: not JSON ({error.msg}): {found!r}. "
                "Each line must hold one JSON object."
            ) from error
        if not isinstance(row, dict):
            raise SourceError(f"{path} line {number}: expected a JSON object, found {row!r:.60}.")
        rows.append((f"{path} line {number}", row))
    return rows


def _hub_rows(dataset_id):
    import datasets

    try:
        data = datasets.load_dataset(dataset_id, split="train")
    except Exception as error:  # the library raises many kinds
        raise SourceError(f"Hub dataset '{dataset_id}' could not be loaded: {error}") from error
    return [(f"{dataset_id} row {i}", dict(row)) for i, row in enumerate(data)]


def _field(place: str, row: dict, *names: str) -> str:
    for name in names:
        if row.get(name) is not None:
            return str(row[name])
    raise SourceError(f"{place}: no field {' or '.join(map(repr, names))}; found {sorted(row)}.")


def _ask(prompt: str) -> tuple[tuple[str, str], ...]:
    return (("user", prompt.strip()),)


def _square(rows, suffixes=("_en", "")) -> Iterable[Example]:
    for place, row in rows:
        label = SAFE if _field(place, row, "acceptable?") in ("1", "1.0", "True") else UNSAFE
        question = _field(place, row, *(f"question{s}" for s in suffixes))
        answer = _field(place, row, *(f"response{s}" for s in suffixes))
        category = row.get("category") or ""
        category = category if isinstance(category, str) else " ".join(category)
        yield Example(_ask(question), answer, label, category=category)


def _kosbi(rows, suffixes=("_en", "")) -> Iterable[Example]:
    for place, row in rows:
        context = _field(place, row, *(f"context{s}" for s in suffixes))
        sentence = _field(place, row, *(f"sentence{s}" for s in suffixes))
        label = SAFE if _field(place, row, "sentence_label") == "safe" else UNSAFE
        category = str(row.get("demographic_category") or "")
        yield Example(_ask(context), sentence, label, category=category)


def parse_dialogue(text: str) -> tuple[tuple[str, str], ...]:
    """Splits `\\n\\nHuman: ...\\n\\nAssistant: ...` text into (role, text) turns."""
    turns = []
    for part in text.split("\n\nHuman:")[1:]:
        question, *answers = part.split("\n\nAssistant:")
        turns.append(("user", question.strip()))
        turns.extend(("assistant", answer.strip()) for answer in answers)
    return tuple(turns)


def _hh_rlhf(rows) -> Iterable[Example]:
    for place, row in rows:
        for field, label in (("chosen", SAFE), ("rejected", UNSAFE)):
            turns = parse_dialogue(_field(place, row, field))
            if len(turns) < 2 or turns[-1][0] != "assistant":
                raise SourceError(f"{place}: '{field}' does not end in an Assistant turn.")
            if turns[-2][0] == "user" and turns[-1][1]:
                yield Example(turns[:-1], turns[-1][1], label)


def _hh_rejected(rows) -> Iterable[Example]:
    """The rejected answers alone: `chosen` is the better of two, not necessarily safe."""
    return (e for e in _hh_rlhf(rows) if e.label == UNSAFE)


def _xstest(rows) -> Iterable[Example]:
    """Completions with human labels: complying with a `contrast_` prompt is unsafe, refusing, or
    complying with a safe prompt, is safe; partial refusals are unknown."""
    for place, row in rows:
        judged, kind = _field(place, row, "final_label"), _field(place, row, "type")
        complied = judged == "1_full_compliance"
        label = UNSAFE if complied and kind.startswith("contrast") else SAFE
        label = UNKNOWN if judged == "3_partial_refusal" else label
        answer = _field(place, row, "completion").strip()
        yield Example(_ask(_field(place, row, "prompt")), answer, label, category=kind)


def _dolly(rows) -> Iterable[Example]:
    for place, row in rows:
        prompt = _field(place, row, "instruction")
        if (row.get("context") or "").strip():
            prompt = f"{prompt}\n\n{row['context'].strip()}"
        response = _field(place, row, "response")
        yield Example(_ask(prompt), response, SAFE, category=row.get("category") or "")


def _alpaca(rows) -> Iterable[Example]:
    for place, row in rows:
        prompt = _field(place, row, "instruction")
        if (row.get("input") or "").strip():
            prompt = f"{prompt}\n\n{row['input'].strip()}"
        yield Example(_ask(prompt), str(row.get("output") or ""), SAFE)


def _advbench(rows) -> Iterable[Example]:
    for place, row in rows:
        yield Example(_ask(_field(place, row, "goal")), "")


def _derta(rows) -> Iterable[Example]:
    for place, row in rows:
        prompt = _field(place, row, "prefix", "question")
        prompt = prompt.removeprefix("### Instruction:\n").removesuffix("\n\n### Response:")
        yield Example(_ask(prompt), str(row.get("text", "")).strip(), UNSAFE)


def _prompts(rows) -> Iterable[Example]:
    for place, row in rows:
        prompt = _field(place, row, "prompt", "instruction", "question", "goal")
        category = str(row.get("category") or row.get("type") or "")
        yield Example(_ask(prompt), "", category=category)


def _chat(rows) -> Iterable[Example]:
    for place, row in rows:
        messages = row.get("messages")
        if not isinstance(messages, list) or not messages:
            raise SourceError(f"{place}: 'messages' must be a list of {{role, content}}.")
        try:
            turns = tuple((m["role"], m["content"]) for m in messages)
        except (TypeError, KeyError) as error:
            raise SourceError(f"{place}: each message needs 'role' and 'content'.") from error
        label = row.get("label", UNKNOWN)
        if label not in (SAFE, UNSAFE, UNKNOWN):
            raise SourceError(f"{place}: label must be safe, unsafe or unknown, found {label!r}.")
        response = ""
        if turns[-1][0] == "assistant":
            turns, response = turns[:-1], turns[-1][1]
        if not turns or turns[-1][0] != "user":
            raise SourceError(f"{place}: the dialogue must have a user turn before its answer.")
        yield Example(
            turns,
            response,
            label,
            user=str(row.get("user", "")),
            category=str(row.get("category", "")),
            language=str(row.get("language", "")),
        )


READERS: dict[str, Callable] = {
    "square": _square,
    "square_ko": functools.partial(_square, suffixes=("",)),
    "kosbi": _kosbi,
    "kosbi_ko": functools.partial(_kosbi, suffixes=("",)),
    "hh_rlhf": _hh_rlhf,
    "hh_rejected": _hh_rejected,
    "xstest": _xstest,
    "dolly": _dolly,
    "alpaca": _alpaca,
    "advbench": _advbench,
    "derta": _derta,
    "prompts": _prompts,
    "chat": _chat,
}


def part_of(prompt: str) -> str:
    """`heldout` (a tenth), `clients` or `server` (the rest by halves), by a hash of the prompt."""
    digest = hashlib.sha256(prompt.encode()).digest()
    if digest[0] % 10 == 0:
        return "heldout"
    return "clients" if digest[1] % 2 else "server"


def parse_source(source: str) -> tuple[str, str, str]:
    """Splits `name:location#part`, or raises `SourceError` naming what is known."""
    name, _, location = source.partition(":")
    location, _, part = location.partition("#")
    if name not in READERS or not location:
        known = ", ".join(sorted(READERS))
        raise SourceError(f"source '{source}': expected NAME:LOCATION with NAME one of {known}.")
    if part and part not in PARTS:
        raise SourceError(f"source '{source}': part '#{part}' is not one of {sorted(PARTS)}.")
    return name, location, part


def load(source: str, data_dir: str) -> list[Example]:
    """Examples of one source, each marked with the reader's name.

    Args:
      source: `name:location`.
      data_dir: folder of the location, or `hub`.

    Raises:
      SourceError: naming the file, the line or the field at fault.
    """
    name, location, part = parse_source(source)
    examples = list(READERS[name](read_rows(location, data_dir)))
    if part:
        examples = [e for e in examples if part_of(e.prompt) in PARTS[part]]
    if not examples:
        raise SourceError(f"{location}: the dataset is empty; it needs at least one example.")
    return [example._replace(source=name) for example in examples]


def load_choices(location: str, data_dir: str) -> list[Choice]:
    """The HHH comparisons: the 438-item file, or rows with a `category` as in BIG-bench.

    The 438-item file names no category; its items are grouped by `single turn` and `multi turn`.
    """
    choices = []
    for place, row in read_rows(location, data_dir):
        better = parse_dialogue(_field(place, row, "text_correct"))
        worse = parse_dialogue(_field(place, row, "text_incorrect"))
        turns = sum(role == "user" for role, _ in better)
        category = row.get("category") or ("single turn" if turns == 1 else "multi turn")
        choices.append(Choice(better[:-1], better[-1][1], worse[-1][1], category))
    return choices
