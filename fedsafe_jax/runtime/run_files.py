"""Files of a run's workdir, written so that a resumed run never doubles a line.

Only the primary process writes; in any other process a write does nothing.
"""

import json
import logging
import types
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from fedsafe_jax import whole_files
from fedsafe_jax.runtime import multihost
from fedsafe_jax.whole_files import StorageError, WorkdirError

__all__ = [
    "OF_A_ROUND",
    "StorageError",
    "WorkdirError",
    "arm_folder",
    "cai_name",
    "changed_fields",
    "check_config",
    "claim_workdir",
    "file_name",
    "outcome_file",
    "read_config",
    "read_lines",
    "replace_lines",
    "write_json",
]


NO_FIELDS: Mapping[str, type] = types.MappingProxyType({})
OF_A_ROUND: Mapping[str, type] = types.MappingProxyType({"arm": str, "seed": int, "round": int})


def file_name(arm: str) -> str:
    """Returns the id of an arm as the name of a file or folder."""
    return arm.replace("/", "_")


def outcome_file(workdir: epath.Path, arm: str, seed: int) -> epath.Path:
    """Returns the file of the outcomes of one arm and seed.

    Args:
      workdir: folder of the run.
      arm: `arms.PlannedArm.folder`.
      seed: the seed.
    """
    return workdir / "arms" / f"{arm}_seed{seed}.json"


def arm_folder(workdir: epath.Path, kind: str, arm: str, seed: int) -> epath.Path:
    """Returns where a run keeps the files of one arm and seed.

    Args:
      workdir: folder of the run.
      kind: "checkpoints" or "updates".
      arm: `arms.PlannedArm.folder`.
      seed: the seed.
    """
    return workdir / kind / arm / f"seed{seed}"


def cai_name(round_number: int) -> str:
    """Returns the name of the file of a round's records of CAI, below `cai/`."""
    return f"round_{round_number:03d}.jsonl"


def write_json(path: epath.Path, content: Any) -> None:
    """Writes JSON such that a kill leaves the old or the new file.

    Raises:
      StorageError: the storage does not take it.
    """
    if multihost.is_primary():
        whole_files.write(path, whole_files.to_json(content, indent=1) + b"\n")


def read_lines(path: epath.Path, fields: Mapping[str, type] = NO_FIELDS) -> list[dict]:
    """Reads the rows of a JSONL file; without the file there are none.

    A last line that was cut off is skipped, with a warning.

    Args:
      path: the file.
      fields: what each row must have, such as `OF_A_ROUND`.

    Raises:
      WorkdirError: another line is damaged.
      StorageError: the storage does not give the file.
    """
    rows, wrong = whole_files.parse_lines(whole_files.read(path) or b"", path, fields)
    if wrong:
        logging.warning("%s: %s, and is left out", path, wrong)
    return rows


def replace_lines(
    path: epath.Path,
    stale: Callable[[dict], bool],
    rows: list[dict],
    fields: Mapping[str, type] = NO_FIELDS,
) -> None:
    """Drops stale rows of a JSONL file and appends new ones, atomically.

    A file whose last line was cut off stays beside the new one, as `NAME.damaged`.

    Args:
      path: the file, created if missing.
      stale: whether a row is to be dropped.
      rows: new rows.
      fields: what each old row must have, such as `OF_A_ROUND`.

    Raises:
      WorkdirError: another line is damaged; nothing is changed.
      StorageError: the storage does not take the file.
    """
    if not multihost.is_primary():
        return
    old, wrong = whole_files.parse_lines(whole_files.read(path) or b"", path, fields)
    if wrong:
        whole_files.set_aside(path, wrong, keep=True)
    kept = [row for row in old if not stale(row)]
    whole_files.write(path, whole_files.to_json_lines([*kept, *rows]))


def _flat(tree: dict, prefix: str = "") -> dict:
    """Flattens nested dictionaries; keys are joined by dots."""
    out = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def read_config(workdir: epath.Path) -> dict | None:
    """Returns the config of the run in a workdir, None where there is none.

    Raises:
      ValueError: its `config.json` is damaged.
      StorageError: the storage does not give it.
    """
    content = whole_files.read(workdir / "config.json")
    if content is None:
        return None
    try:
        stored = json.loads(content.decode("utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if not isinstance(stored, dict):
        raise ValueError(f"expected an object, found {stored!r:.40}")
    return stored


def check_config(workdir: epath.Path, config: dict) -> bool:
    """Checks that `config.json`, where there is one, holds the same config.

    Args:
      workdir: folder of the run.
      config: all fields, nested.

    Returns:
      Whether a run with this config was begun here before.

    Raises:
      WorkdirError: the workdir holds a run of another config, or a damaged `config.json`.
      StorageError: the storage does not give it.
    """
    path = workdir / "config.json"
    try:
        stored = read_config(workdir)
    except ValueError as error:
        raise WorkdirError(
            f"{path} is damaged ({error}), so nothing says which config the run here has. Choose "
            "another --workdir; or, if it is sure that this command began the run, delete that "
            "file."
        ) from None
    if stored is None:
        return False
    if changed := changed_fields(stored, config):
        field, (old, new) = next(iter(changed.items()))
        raise WorkdirError(
            f"--workdir={workdir} holds a run with {field}={old!r}, this command has {new!r} "
            f"({len(changed)} field(s) differ). Choose another --workdir."
        )
    return True


def changed_fields(stored: dict, config: dict) -> dict[str, tuple]:
    """Returns `{field: (value in a file, value of a config)}` of all that differ, sorted by name.

    Args:
      stored: content of a `config.json`.
      config: all fields, nested.
    """
    config = json.loads(whole_files.to_json(config))  # tuples become lists, as in the file
    old, new = _flat(stored), _flat(config)
    names = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
    return {name: (old.get(name), new.get(name)) for name in names}


def claim_workdir(workdir: epath.Path, config: dict) -> bool:
    """Writes `config.json`, or checks that an existing one holds the same config.

    Args, Returns, Raises: see `check_config`.
    """
    begun = check_config(workdir, config)
    if not begun:
        write_json(workdir / "config.json", config)
    return begun
