"""Answers as a log of inspect_ai, format 2: https://inspect.aisi.org.uk/eval-logs.html.

The log is written by its documented fields and needs no inspect_ai. `inspect view` shows it, and
`inspect score` scores it anew.
"""

import datetime
from collections.abc import Sequence
from typing import Any

from fedsafe_jax.interop.origin import Origin, numbered, short_hash, specs_of, value_of

FORMAT = 2
# Scoring anew makes the model of the log ready. "none" is the provider that asks nobody.
PROVIDER = "none"
SAID = ("item", "sample", "messages", "answer", "verdicts", "reference", "finished")
SETTINGS = {
    "max_new_tokens": "max_tokens",
    "temperature": "temperature",
    "system": "system_message",
}


def log_of(rows: Sequence[dict], origin: Origin, created: datetime.datetime) -> dict:
    """Returns the log of one task, ready for JSON.

    Args:
      rows: rows of answers, see `evals.answers.ask`, with `verdicts` where they are judged.
      origin: whose answers they are.
      created: when the log was made.
    """
    names = numbered(rows)
    ids = list(dict.fromkeys(name for name, _ in names))
    if any(isinstance(name, str) for name in ids):  # inspect has numbers or texts, not both
        names = [(str(name), epoch) for name, epoch in names]
        ids = [str(name) for name in ids]
    given = {SETTINGS[k]: v for k, v in origin.settings.items() if k in SETTINGS and v != ""}
    others = {k: v for k, v in origin.settings.items() if k not in SETTINGS and v != ""}
    stamp, identity = created.isoformat(), short_hash(origin, rows, created)
    epochs = max((epoch for _, epoch in names), default=1)
    log = {
        "version": FORMAT,
        "status": "success",
        "eval": {
            "eval_id": identity,
            "run_id": short_hash(origin.model, created),
            "created": stamp,
            "task": origin.task,
            "task_id": short_hash(origin.task, origin.version, origin.source),
            "task_version": origin.version,
            "tags": list(origin.tags) or None,
            "dataset": {
                "name": origin.source or origin.task,
                "samples": len(ids),
                "sample_ids": ids,
                "shuffled": False,
            },
            "model": f"{PROVIDER}/{origin.model}",
            "model_generate_config": given,
            "config": {"epochs": epochs},
            "packages": dict(origin.packages),
            "metadata": {"model": origin.model} | others | dict(origin.facts),
        },
        "plan": {"name": "plan", "steps": [{"solver": "fedsafe_evaluate"}], "config": given},
        "results": {
            "total_samples": len(rows),
            "completed_samples": len(rows),
            "scores": [_rate(rows, spec) for spec in specs_of(rows)],
        },
        "stats": {"started_at": stamp, "completed_at": stamp, "model_usage": {}},
        "samples": [
            _sample(row, name, epoch, model=origin.model)
            for row, (name, epoch) in zip(rows, names, strict=True)
        ],
    }
    return _whole_characters(log)


def file_name(log: dict) -> str:
    """Returns the name of a log by which `inspect view` finds it: time, task, identifier."""
    created = datetime.datetime.fromisoformat(log["eval"]["created"])
    task = "".join(c if c.isalnum() or c == "-" else "-" for c in log["eval"]["task"])
    return f"{created:%Y-%m-%dT%H-%M-%S}+00-00_{task}_{log['eval']['eval_id']}.json"


def _sample(row: dict, name: int | str, epoch: int, model: str) -> dict:
    asked = [dict(turn) | {"source": "input"} for turn in row["messages"]]
    said = {"role": "assistant", "content": row["answer"], "source": "generate", "model": model}
    said_by = row.get("verdicts") or {}
    choice = {"message": said, "stop_reason": _stop(row.get("finished"))}
    failed = [spec for spec, verdict in said_by.items() if verdict is None]
    metadata = {key: value for key, value in row.items() if key not in SAID}
    return {
        "id": name,
        "epoch": epoch,
        "input": asked,
        "target": str(row.get("reference", "")),
        "messages": [*asked, said],
        "output": {"model": model, "choices": [choice], "completion": row["answer"]},
        "scores": {
            spec: {
                "value": value_of(verdict),
                "answer": row["answer"],
                "metadata": {k: v for k, v in verdict.items() if v is not None},
            }
            for spec, verdict in said_by.items()
            if verdict is not None
        },
        "metadata": metadata | ({"judges_failed": failed} if failed else {}),
    }


def _stop(finished: object) -> str:
    if not isinstance(finished, bool):
        return "unknown"
    return "stop" if finished else "max_tokens"


def _whole_characters(value: Any) -> Any:
    """Replaces halves of surrogate pairs, where a model stopped within a character.

    One of them anywhere would keep inspect_ai from reading the log.
    """
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {_whole_characters(key): _whole_characters(one) for key, one in value.items()}
    return [_whole_characters(one) for one in value] if isinstance(value, list | tuple) else value


def _rate(rows: Sequence[dict], spec: str) -> dict:
    verdicts = [row["verdicts"].get(spec) for row in rows if row.get("verdicts")]
    values = [value_of(verdict) for verdict in verdicts if verdict is not None]
    mean = {"mean": {"name": "mean", "value": sum(values) / len(values)}} if values else {}
    return {
        "name": spec,
        "scorer": spec,
        "scored_samples": len(values),
        "unscored_samples": len(rows) - len(values),
        "metrics": mean,
    }
