"""The files of a run's workdir, written so that a resumed run never doubles a line."""

import json
from collections.abc import Callable

from etils import epath

from fedsafe_jax.runtime import multihost


class WorkdirError(RuntimeError):
    """The workdir holds another run."""


def write_json(path: epath.Path, content) -> None:
    """Writes JSON through a temporary file, so that a killed run leaves the old or the new one.

    Nothing in all processes but the first, here and below.
    """
    if not multihost.is_primary():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_lines(path: epath.Path) -> list[dict]:
    """The rows of a JSONL file, none without the file; a last line cut by a kill is skipped."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows


def replace_lines(path: epath.Path, stale: Callable[[dict], bool], rows: list[dict]) -> None:
    """Drops the rows that are `stale` and appends `rows`, atomically."""
    if not multihost.is_primary():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [row for row in read_lines(path) if not stale(row)] + rows
    temporary = path.with_suffix(path.suffix + ".tmp")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _flat(tree: dict, prefix: str = "") -> dict:
    out = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def claim_workdir(workdir: epath.Path, config: dict) -> bool:
    """Writes `config.json`, or checks that the one there is the same.

    Returns:
      Whether a run with this config had begun here.

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
