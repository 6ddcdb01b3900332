"""Whether the files that a run reads are those that it began with, by their content.

`inputs.json` in the workdir holds the SHA-256 of each. A file that has changed between two starts
would give a run of which no part can be reproduced: it stops, as at a changed field of the config.
"""

import concurrent.futures
import hashlib
import os
import pathlib
import re
from collections.abc import Mapping

from etils import epath

from fedsafe_jax import whole_files
from fedsafe_jax.runtime import run_files
from fedsafe_jax.whole_files import StorageError, WorkdirError

NAME = "inputs.json"
# Larger files are read again only where size or times have changed; one core reads 1.3 GB a second.
ALWAYS_READ_BYTES = 64 << 20
THREADS = 4
SHORT = 12  # digits of a hash in messages


def check(workdir: epath.Path, files: Mapping[str, os.PathLike | str]) -> str:
    """Checks the files against the workdir's `inputs.json`, which is written where there is none.

    Args:
      workdir: folder of the run.
      files: what is read, by a name that stays the same wherever the files lie; a text is content
        that is in no file of its own.

    Returns:
      What was done: "written", "same".

    Raises:
      WorkdirError: a file has changed, is gone or is new; the message names it.
      StorageError: a file cannot be read, or `inputs.json` not written.
    """
    path = workdir / NAME
    before = _stored(path)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        known = [before.get(name, {}) for name in files]
        now = dict(zip(files, pool.map(_entry, files.values(), known), strict=True))
    if before:
        _compare(workdir, before, now)
    if before != now:
        run_files.write_json(path, now)
    return "same" if before else "written"


def hashes(workdir: epath.Path) -> dict[str, str]:
    """Returns the SHA-256 of each file that a run reads, by name; {} where nothing says them."""
    return {name: entry["sha256"] for name, entry in _stored(workdir / NAME).items()}


def _stored(path: epath.Path) -> dict:
    """Returns what the file holds, {} where there is none; a damaged one is set aside."""
    stored = whole_files.read_json(path)
    if stored is None:
        return {}
    entries = stored.values() if isinstance(stored, dict) else [None]
    if not all(isinstance(e, dict) and {"sha256", "path"} <= e.keys() for e in entries):
        whole_files.set_aside(path, "it holds no hashes of files")
        return {}
    return stored


def _compare(workdir: epath.Path, before: dict, now: dict) -> None:
    """Raises `WorkdirError` at the first difference."""
    changes = []
    for name in sorted(before.keys() | now.keys()):
        old, new = (side[name]["sha256"][:SHORT] if name in side else "" for side in (before, now))
        if old != new:
            where = (now.get(name) or before[name])["path"]
            how = f"was {old or 'not there'}, is {new or 'gone'}"
            changes.append(f"{name} ({where}) {how}")
    if changes:
        raise WorkdirError(
            f"--workdir={workdir} holds a run that began with other files: {changes[0]} (SHA-256; "
            f"{len(changes)} file(s) differ). Give it back the files it began with, or choose "
            "another --workdir."
        )


def _entry(file: os.PathLike | str, known: dict) -> dict:
    """Returns hash, place, size and times of a file; those known of an unchanged large one."""
    if isinstance(file, str):
        return {"sha256": hashlib.sha256(file.encode("utf-8", "backslashreplace")).hexdigest()} | {
            "path": "content"
        }
    path = pathlib.Path(file)
    try:
        stat = path.stat()
        entry = {"path": str(path), "size": stat.st_size}
        # The time of change cannot be set by a program that copies a file with its old times.
        entry["times"] = [stat.st_mtime_ns, stat.st_ctime_ns]
        if stat.st_size > ALWAYS_READ_BYTES and entry.items() <= known.items():
            return known
        return {"sha256": _blob(path) or of_file(path)} | entry
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror or error}).") from error


def _blob(path: pathlib.Path) -> str:
    """Returns the hash that the Hub's cache names a large file by; "" for any other file."""
    target = path.resolve()
    named = target.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", target.name)
    return target.name if named else ""


def of_file(path: os.PathLike) -> str:
    """Returns the SHA-256 of a file, in hexadecimal digits, read piece by piece."""
    with epath.Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
