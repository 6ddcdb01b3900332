"""Files of a run's workdir, written so that a resumed run never doubles a line.

Only the primary process writes; in any other process a write does nothing.
"""

import json
from collections.abc import Callable
from typing import Any

from etils import epath

from fedsafe_jax.runtime import multihost


class WorkdirError(RuntimeError):
    """The workdir holds another run."""


def arm_folder(workdir: epath.Path, kind: str, arm: str, seed: int) -> epath.Path:
    """Returns where a run keeps the files of one arm and seed.

    Args:
      workdir: folder of the run.
      kind: "checkpoints" or "updates".
      arm: `arms.PlannedArm.folder`.
      seed: the seed.
    """
    return workdir / kind / arm / f"seed{seed}"


def write_json(path: epath.Path, content: Any) -> None:
    """Writes JSON through a temporary file, so that a killed run leaves the old or the new file."""
    if not multihost.is_primary():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_lines(path: epath.Path) -> list[dict]:
    """Reads the rows of a JSONL file; without the file there are none.

    A last line that a kill cut off is skipped.
    """
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows


def replace_lines(path: epath.Path, stale: Callable[[dict], bool], rows: list[dict]) -> None:
    """Drops stale rows of a JSONL file and appends new ones, atomically.

    Args:
      path: the file, created if missing.
      stale: whether a row is to be dropped.
      rows: new rows.
    """
    if not multihost.is_primary():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [row for row in read_lines(path) if not stale(row)] + rows
    temporary = path.with_suffix(path.suffix + ".tmp")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _flat(tree: dict, prefix: str = "") -> dict:
    """Flattens nested dictionaries; keys are joined by dots."""
    out = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def claim_workdir(workdir: epath.Path, config: dict) -> bool:
    """Writes `config.json`, or checks that an existing one holds the same config.

    Args:
      workdir: folder of the run.
      config: all fields, nested.

    Returns:
      Whether a run with this config was begun here before.

    Raises:
      WorkdirError: the workdir holds a run of another config.
    """
    path = workdir / "config.json"
    config = json.loads(json.dumps(config))  # tuples become lists, as in the file
    if path.is_file():
        old, new = _flat(json.loads(path.read_text(encoding="utf-8"))), _flat(config)
        changed = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
        if changed:
            field = changed[0]
            raise WorkdirError(
                f"--workdir={workdir} holds a run with {field}={old.get(field)!r}, this "
                f"command has {new.get(field)!r} ({len(changed)} field(s) differ). "
                "Choose another --workdir."
            )
        return True
    write_json(path, config)
    return False
