"""Answers as `samples_TASK_TIME.jsonl`, which lm-evaluation-harness writes with `--log_samples`.

A row is a document: what was asked (`arguments`), all answers (`resps`), and what is left behind
the filter (`filtered_resps`), with a field for each metric. Hashes are made as the harness makes
them, by which its tools find the same document in two files.
"""

import datetime
import hashlib
import json
import re
from collections.abc import Sequence

from fedsafe_jax.interop.origin import Origin, numbered, specs_of, value_of

FILTER = "none"
SETTINGS = {"max_new_tokens": "max_gen_toks", "temperature": "temperature"}


def samples_of(rows: Sequence[dict], origin: Origin) -> list[dict]:
    """Returns the samples of one task, a row an item.

    Args:
      rows: rows of answers, see `evals.answers.ask`, with `verdicts` where they are judged.
      origin: whose answers they are.
    """
    items: dict[int | str, list[dict]] = {}
    for row, (name, _) in zip(rows, numbered(rows), strict=True):
        items.setdefault(name, []).append(row)
    specs = specs_of(rows)
    return [_sample(i, items[name], origin, specs=specs) for i, name in enumerate(items)]


def file_name(origin: Origin, created: datetime.datetime) -> str:
    """Returns folder and name of the file, as the harness names them: `MODEL/samples_...`."""
    model = re.sub(r'["<>:/|\\?*\[\]]+', "__", origin.model).strip(".") or "model"
    task = re.sub(r"\W", "_", origin.task)
    return f"{model}/samples_{task}_{created:%Y-%m-%dT%H-%M-%S.%f}.jsonl"


def _sample(number: int, rows: list[dict], origin: Origin, specs: Sequence[str]) -> dict:
    first = rows[0]
    doc = {k: v for k, v in first.items() if k not in ("answer", "verdicts", "sample", "finished")}
    target, prompt = str(first.get("reference", "")), _prompt(first["messages"])
    settings = {"until": []} | {SETTINGS[k]: v for k, v in origin.settings.items() if k in SETTINGS}
    said = [row["answer"] for row in rows]
    return {
        "doc_id": number,
        "doc": doc,
        "target": target,
        "arguments": {"gen_args_0": {"arg_0": prompt, "arg_1": settings}},
        "resps": [said],
        "filtered_resps": said if len(said) == 1 else [said],
        "filter": FILTER,
        "metrics": list(specs),
        "doc_hash": _hash(json.dumps(doc, indent=2, ensure_ascii=False)),
        "prompt_hash": _hash(prompt if isinstance(prompt, str) else prompt[0]),
        "target_hash": _hash(target),
    } | {spec: _mean(rows, spec) for spec in specs}


def _prompt(messages: Sequence[dict]) -> str | list[str]:
    """A lone request as its text; a dialogue as the harness logs that of a chat endpoint."""
    if len(messages) == 1:
        return messages[0]["content"]
    return [json.dumps(list(messages), ensure_ascii=False)]


def _mean(rows: Sequence[dict], spec: str) -> float | None:
    verdicts = [(row.get("verdicts") or {}).get(spec) for row in rows]
    values = [value_of(verdict) for verdict in verdicts if verdict is not None]
    return sum(values) / len(values) if values else None


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()
