"""Scores a file of pairs with a trained filter, and says what would be done with each.

python -m fedsafe_jax.filter_data --filter=DIR --input=pairs.jsonl --output=scored.jsonl

Input lines hold `prompt`, `response` and, where known, `label` (safe or unsafe); output lines add
`p_unsafe` and `action`.
"""

import json
import pathlib

from absl import app, flags, logging

_FILTER = flags.DEFINE_string("filter", None, "Folder that fedsafe_jax.train_filter wrote.")
_INPUT = flags.DEFINE_string("input", None, "JSON lines with prompt and response.")
_OUTPUT = flags.DEFINE_string("output", None, "JSON lines, written.")
_ACTION = flags.DEFINE_string("action", "drop", "Named for flagged pairs; others are kept.")
_THRESHOLD = flags.DEFINE_float("threshold", 0.0, "P(unsafe) that flags; 0: the filter's own.")
_SAMPLES = flags.DEFINE_integer("samples", 3, "Pairs shown of each verdict.")


class PairsError(ValueError):
    """The input cannot be read; the message names the line."""


def read_pairs(path: pathlib.Path) -> list[dict]:
    """The rows of a file of pairs.

    Raises:
      PairsError: no file, a line that is not UTF-8 or not JSON, or a missing field.
    """
    if not path.is_file():
        raise PairsError(f"--input: {path}: no such file.")
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise PairsError(
                f"{where}: not UTF-8 ({error.reason} at byte {error.start})."
            ) from None
        except json.JSONDecodeError as error:
            raise PairsError(f"{where}: not JSON ({error.msg}).") from None
        for field in ("prompt", "response"):
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                raise PairsError(f"{where}: needs a text '{field}'.")
        if row.get("label", "safe") not in ("safe", "unsafe"):
            raise PairsError(f"{where}: label must be safe or unsafe, found {row['label']!r}.")
        rows.append(row)
    if not rows:
        raise PairsError(f"{path}: no pairs.")
    return rows


def run(folder: str, rows: list[dict], action: str, threshold: float) -> list[dict]:
    """The rows with `p_unsafe` and `action`; an empty response is kept, as nothing was said."""
    from fedsafe_jax.data.examples import Example
    from fedsafe_jax.filters import store
    from fedsafe_jax.inference.language_model import load_pretrained

    found = store.load(folder, load_pretrained)
    pairs = [Example((("user", row["prompt"]),), row["response"]) for row in rows]
    probability = found.score(pairs)
    threshold = threshold or found.decision.threshold
    out = []
    for row, p in zip(rows, probability, strict=True):
        empty = not row["response"].strip()
        done = action if p >= threshold and not empty else "keep"
        out.append(row | {"p_unsafe": 0.0 if empty else round(float(p), 6), "action": done})
    return out


def main(argv):
    del argv
    for name, flag in (("filter", _FILTER), ("input", _INPUT), ("output", _OUTPUT)):
        if not flag.value:
            raise SystemExit(f"--{name}: missing; see --help.")
    from fedsafe_jax.filters import actions, quality
    from fedsafe_jax.validation import input_errors

    logging.set_verbosity(logging.WARNING)
    try:
        if _ACTION.value not in actions.ACTIONS:
            raise PairsError(f"--action={_ACTION.value}: one of {', '.join(actions.ACTIONS)}.")
        rows = read_pairs(pathlib.Path(_INPUT.value))
        out = run(_FILTER.value, rows, _ACTION.value, _THRESHOLD.value)
    except (PairsError, *input_errors()) as error:
        raise SystemExit(f"error: {error}") from None
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in out)
    pathlib.Path(_OUTPUT.value).write_text(lines, encoding="utf-8")
    flagged = [row for row in out if row["action"] != "keep"]
    empty = sum(not row["response"].strip() for row in out)
    print(f"{len(out)} pairs: {len(out) - len(flagged)} keep, {len(flagged)} {_ACTION.value}")
    if empty:
        print(f"{empty} of them have an empty response and are kept")
    known = [row for row in out if "label" in row]
    if known:
        q = quality.quality(
            [row["label"] == "unsafe" for row in known], [row["action"] != "keep" for row in known]
        )
        print(
            f"{len(known)} labelled: precision {q.precision:.1f}, recall {q.recall:.1f}, harmonic "
            f"mean {q.hmean:.1f}, accuracy {q.accuracy:.1f}"
        )
    for title, some in (("flagged", flagged), ("kept", [r for r in out if r["action"] == "keep"])):
        for row in some[: _SAMPLES.value]:
            print(
                f"{title} {row['p_unsafe']:.2f}  {row['prompt'][:60]!r} -> {row['response'][:80]!r}"
            )
    print(f"output: {_OUTPUT.value}")


if __name__ == "__main__":
    app.run(main)
