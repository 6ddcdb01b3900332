"""Scores a file of pairs with a trained filter, and says what would be done with each.

    fedsafe filter --filter=DIR --input=pairs.jsonl --output=scored.jsonl

Input rows (JSON lines, or another form that `data.sources` reads) hold `prompt`, `response` and,
where known, `label` (safe or unsafe), or a dialogue in `messages` as training data do; output lines
add `p_unsafe` and `action`.
"""

import os
import pathlib

from absl import flags

from fedsafe_jax import whole_files
from fedsafe_jax.cli.command import Command, check_file
from fedsafe_jax.data.dialogue_rows import read_dialogues
from fedsafe_jax.data.examples import UNKNOWN, Example, SourceError
from fedsafe_jax.data.row_fields import ask, field
from fedsafe_jax.data.sources import read_rows
from fedsafe_jax.filters.actions import ACTIONS


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags."""
    here = {"flag_values": values}
    flags.DEFINE_string("filter", None, "Folder that `fedsafe train-filter` wrote.", **here)
    flags.DEFINE_string("input", None, "Rows with prompt and response, or messages.", **here)
    flags.DEFINE_string("output", None, "JSON lines, written.", **here)
    flags.DEFINE_enum(
        "action", "drop", list(ACTIONS), "Named for flagged pairs; others are kept.", **here
    )
    flags.DEFINE_float("threshold", 0.0, "P(unsafe) that flags; 0: the filter's own.", **here)
    flags.DEFINE_integer("samples", 3, "Pairs shown of each verdict.", **here)


def read_pairs(path: pathlib.Path) -> list[tuple[dict, Example]]:
    """Reads the rows of a file of pairs, each beside the pair that it holds.

    Raises:
      SourceError: no file, text that cannot be read, a missing field, or an unknown label.
    """
    if not os.path.isfile(path):
        raise SourceError(f"--input: {path}: no such file.")
    pairs = []
    for place, row in read_rows(path.name, str(path.parent)):
        if "messages" in row or "conversations" in row:
            pairs += [(row, pair) for pair in read_dialogues([(place, row)])]
            continue
        if row.get("label") not in (None, "", "safe", "unsafe"):
            raise SourceError(f"{place}: label must be safe or unsafe, found {row['label']!r:.60}.")
        prompt, response = (field(place, row, name) for name in ("prompt", "response"))
        pairs.append((row, Example(ask(place, prompt), response, row.get("label") or UNKNOWN)))
    return pairs


def score(
    folder: str, pairs: list[tuple[dict, Example]], action: str, threshold: float
) -> list[dict]:
    """Scores pairs with the filter of a folder.

    Args:
      folder: the filter's folder.
      pairs: rows and their pairs, as `read_pairs` returns them.
      action: name of what is done with flagged pairs.
      threshold: P(unsafe) from which a pair is flagged; 0 for the filter's own.

    Returns:
      The rows with `p_unsafe` and `action`; an empty response is kept, as nothing was said.

    Raises:
      FilterError: there is no filter, it is damaged, or a score or the threshold is none.
    """
    from fedsafe_jax.filters import store
    from fedsafe_jax.filters.decision import check_threshold, flag
    from fedsafe_jax.inference.pretrained import load_pretrained
    from fedsafe_jax.runtime import devices

    check_threshold(threshold)
    safety_filter = store.load(folder, load_pretrained)
    devices.announce()
    probability = safety_filter.score([pair for _, pair in pairs])
    threshold = threshold or safety_filter.decision.threshold
    flagged = flag(probability, threshold)
    out = []
    for (row, pair), p, unsafe in zip(pairs, probability, flagged, strict=True):
        empty = not pair.response.strip()
        done = action if unsafe and not empty else "keep"
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
    pairs = read_pairs(pathlib.Path(values.input))
    out = score(values.filter, pairs, values.action, values.threshold)
    with whole_files.storage(values.output):
        pathlib.Path(values.output).write_bytes(whole_files.to_json_lines(out))
    scored = [(row, pair) for row, (_, pair) in zip(out, pairs, strict=True)]
    flagged = [one for one in scored if one[0]["action"] != "keep"]
    kept = [one for one in scored if one[0]["action"] == "keep"]
    empty = sum(not pair.response.strip() for _, pair in pairs)
    print(f"{len(out)} pairs: {len(kept)} keep, {len(flagged)} {values.action}")
    if empty:
        print(f"{empty} of them have an empty response and are kept")
    known = [(row, pair) for row, pair in scored if pair.label != UNKNOWN]
    if known:
        print(measured([row for row, _ in known]))
    for title, some in (("flagged", flagged), ("kept", kept)):
        for row, pair in some[: values.samples]:
            print(f"{title} {row['p_unsafe']:.2f}  {pair.prompt[:60]!r} -> {pair.response[:80]!r}")
    print(f"output: {values.output}")


COMMAND = Command(define_flags, main, required=("filter", "input", "output"))
