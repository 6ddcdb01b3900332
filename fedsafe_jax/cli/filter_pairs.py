"""Scores a file of pairs with a trained filter, and says what would be done with each.

    fedsafe filter --filter=DIR --input=pairs.jsonl --output=scored.jsonl

Input lines hold `prompt`, `response` and, where known, `label` (safe or unsafe); output lines add
`p_unsafe` and `action`.
"""

import json
import pathlib

from absl import flags

from fedsafe_jax import whole_files
from fedsafe_jax.cli.command import Command, check_file
from fedsafe_jax.data.examples import SourceError
from fedsafe_jax.filters.actions import ACTIONS


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags."""
    here = {"flag_values": values}
    flags.DEFINE_string("filter", None, "Folder that `fedsafe train-filter` wrote.", **here)
    flags.DEFINE_string("input", None, "JSON lines with prompt and response.", **here)
    flags.DEFINE_string("output", None, "JSON lines, written.", **here)
    flags.DEFINE_enum(
        "action", "drop", list(ACTIONS), "Named for flagged pairs; others are kept.", **here
    )
    flags.DEFINE_float("threshold", 0.0, "P(unsafe) that flags; 0: the filter's own.", **here)
    flags.DEFINE_integer("samples", 3, "Pairs shown of each verdict.", **here)


def read_pairs(path: pathlib.Path) -> list[dict]:
    """Reads the rows of a file of pairs.

    Raises:
      SourceError: no file, a line that is not UTF-8 or not JSON, or a missing field.
    """
    if not path.is_file():
        raise SourceError(f"--input: {path}: no such file.")
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise SourceError(
                f"{where}: not UTF-8 ({error.reason} at byte {error.start})."
            ) from None
        except json.JSONDecodeError as error:
            raise SourceError(f"{where}: not JSON ({error.msg}).") from None
        for field in ("prompt", "response"):
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                raise SourceError(f"{where}: needs a text '{field}'.")
        if row.get("label", "safe") not in ("safe", "unsafe"):
            raise SourceError(f"{where}: label must be safe or unsafe, found {row['label']!r}.")
        rows.append(row)
    if not rows:
        raise SourceError(f"{path}: no pairs.")
    return rows


def score(folder: str, rows: list[dict], action: str, threshold: float) -> list[dict]:
    """Scores pairs with the filter of a folder.

    Args:
      folder: the filter's folder.
      rows: pairs as `read_pairs` returns them.
      action: name of what is done with flagged pairs.
      threshold: P(unsafe) from which a pair is flagged; 0 for the filter's own.

    Returns:
      The rows with `p_unsafe` and `action`; an empty response is kept, as nothing was said.
    """
    from fedsafe_jax.data.examples import Example
    from fedsafe_jax.filters import store
    from fedsafe_jax.inference.language_model import load_pretrained
    from fedsafe_jax.runtime import devices

    safety_filter = store.load(folder, load_pretrained)
    devices.announce()
    pairs = [Example((("user", row["prompt"]),), row["response"]) for row in rows]
    probability = safety_filter.score(pairs)
    threshold = threshold or safety_filter.decision.threshold
    out = []
    for row, p in zip(rows, probability, strict=True):
        empty = not row["response"].strip()
        done = action if p >= threshold and not empty else "keep"
        out.append(row | {"p_unsafe": 0.0 if empty else round(float(p), 6), "action": done})
    return out


def measured(rows: list[dict]) -> str:
    """Returns a line with the quality on labelled rows.

    Where all have one label, what depends on the other is not defined.
    """
    from fedsafe_jax.filters import quality

    unsafe = [row["label"] == "unsafe" for row in rows]
    q = quality.quality(unsafe, [row["action"] != "keep" for row in rows])
    alone = f", all {rows[0]['label']}" if len(set(unsafe)) < 2 else ""
    precision, recall, mean = (
        quality.shown(None if alone else value) for value in (q.precision, q.recall, q.hmean)
    )
    return (
        f"{len(rows)} labelled{alone}: precision {precision}, recall {recall}, harmonic mean "
        f"{mean}, accuracy {quality.shown(q.accuracy)}"
    )


def main(values: flags.FlagValues) -> None:
    """Scores, writes, and prints counts, quality where labels are known, and samples."""
    check_file("output", values.output)
    rows = read_pairs(pathlib.Path(values.input))
    out = score(values.filter, rows, values.action, values.threshold)
    with whole_files.storage(values.output):
        pathlib.Path(values.output).write_bytes(whole_files.to_json_lines(out))
    flagged = [row for row in out if row["action"] != "keep"]
    kept = [row for row in out if row["action"] == "keep"]
    empty = sum(not row["response"].strip() for row in out)
    print(f"{len(out)} pairs: {len(kept)} keep, {len(flagged)} {values.action}")
    if empty:
        print(f"{empty} of them have an empty response and are kept")
    known = [row for row in out if "label" in row]
    if known:
        print(measured(known))
    for title, some in (("flagged", flagged), ("kept", kept)):
        for row in some[: values.samples]:
            print(
                f"{title} {row['p_unsafe']:.2f}  {row['prompt'][:60]!r} -> {row['response'][:80]!r}"
            )
    print(f"output: {values.output}")


COMMAND = Command(define_flags, main, required=("filter", "input", "output"))
