"""Files that are written whole and kept when damaged: JSON, JSON lines, on disks and buckets.

Every error of the storage is a `StorageError`, one line that names the file.
"""

import contextlib
import errno
import glob
import itertools
import json
import logging
import math
import os
import pathlib
import shutil
import stat
import tempfile
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from etils import epath
from safetensors import SafetensorError


class WorkdirError(RuntimeError):
    """A folder cannot be written to as it is: it holds something else, or something damaged."""


class StorageError(WorkdirError):
    """The storage did not give or take a file; the same command may go on later."""


@contextlib.contextmanager
def storage(path: epath.PathLike, what: str = "cannot be written") -> Iterator[None]:
    """Makes an error of the storage in the block a `StorageError`.

    Safetensors raises its own error of a full disk, and the same one of a damaged file: a block
    that reads tells that apart by itself.

    Args:
      path: the file or folder that the block touches, named in the message.
      what: what failed.

    Raises:
      StorageError: the disk is full or read-only, a folder is a file, a server does not answer.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        said = getattr(error, "strerror", None) or " ".join(str(error).split())
        reason = said or type(error).__name__
        raise StorageError(f"{os.fspath(path)}: {what} ({reason}).") from error


def make_folder(folder: epath.PathLike) -> epath.Path:
    """Returns a folder, created with those above it if missing.

    Raises:
      WorkdirError: it is a file, or lies below one.
      StorageError: it cannot be created.
    """
    folder = epath.Path(folder)
    with storage(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise WorkdirError(
                f"{os.fspath(folder)}: is a file, or lies below one; name a folder."
            ) from None
    return folder


@contextlib.contextmanager
def _beside(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a name to write to, in a folder beside a file that only its owner can enter.

    Nobody can guess the folder's name, so no link can wait for the writer there.
    """
    folder = tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        yield pathlib.Path(folder, path.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_left(folder: pathlib.Path, name: str = "", but: str = "") -> None:
    """Removes what killed writers have left in a folder.

    Args:
      folder: a local folder.
      name: the file that they wrote; "" for any.
      but: one that is left alone.
    """
    for left in folder.glob(f".{glob.escape(name) or '*'}.{'[a-z0-9_]' * 8}.tmp"):
        of_other = but and left.name.startswith(f".{but}.")
        if left.is_dir() and not left.is_symlink() and not of_other:
            shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def replaced(path: epath.PathLike, private: bool = False) -> Iterator[pathlib.Path]:
    """Gives an empty file to write to, which takes the place of `path` at the end of the block.

    A kill or a loss of power leaves the old file or the new one, and what is left of a new one goes
    with the next writing. A link at `path` gives way, and is not followed.

    Args:
      path: a local file, in a folder that exists.
      private: lets nobody but the owner read the file; else the umask decides.

    Raises:
      OSError: the disk does not take it; the old file is still there.
    """
    path = pathlib.Path(path)
    remove_left(path.parent, path.name)
    with _beside(path) as new:
        # A new empty file tells the umask; `os.umask` would have to change it for all threads.
        with open(new, "xb") as empty:
            mode = 0o600 if private else stat.S_IMODE(os.fstat(empty.fileno()).st_mode)
        yield new
        os.chmod(new, mode)  # some writers put a file of their own in place of the empty one
        _to_disk(new)  # else the rename may reach the disk before the content does
        os.replace(new, path)
        _to_disk(path.parent)


def _to_disk(path: pathlib.Path) -> None:
    """Waits until the content of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems have no such call for folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def write(path: epath.PathLike, content: bytes, private: bool = False) -> None:
    """Writes a file such that a kill or a loss of power leaves the old file or the new one.

    Args:
      path: the file; its folder is created if missing.
      content: the whole content.
      private: lets nobody but the owner read a local file; else the umask decides. On object
        storage the bucket's rules hold.

    Raises:
      StorageError: the storage does not take it; the old file is still there.
    """
    path = epath.Path(path)
    make_folder(path.parent)
    with storage(path):
        if "://" in os.fspath(path):  # an object appears whole, or not at all
            path.write_bytes(content)
            return
        with replaced(path, private) as new:
            new.write_bytes(content)


def create(path: epath.PathLike, content: bytes) -> bool:
    """Writes a local file where there is none, whole from its first moment.

    Args:
      path: the file, in a folder that exists.
      content: the whole content.

    Returns:
      False where there is one, or another process creates it at the same time.

    Raises:
      StorageError: the disk does not take it.
    """
    path = pathlib.Path(path)
    with storage(path), _beside(path) as new:
        new.write_bytes(content)
        _to_disk(new)
        try:
            os.link(new, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                raise
            return _create_plainly(path, content)
    return True


def _create_plainly(path: pathlib.Path, content: bytes) -> bool:
    """Writes a file where there is none, on a disk that knows no second name of a file."""
    try:
        with open(path, "xb") as file:
            file.write(content)
    except FileExistsError:
        return False
    return True


def read(path: epath.PathLike) -> bytes | None:
    """Returns the content of a file, None where there is none.

    Raises:
      StorageError: the storage does not give it.
    """
    path = epath.Path(path)
    with storage(path, "cannot be read"):
        return path.read_bytes() if path.is_file() else None


def set_aside(path: epath.PathLike, reason: str, keep: bool = False) -> epath.Path:
    """Renames what is damaged, with a warning; nothing is deleted because it could not be read.

    Args:
      path: a file or folder.
      reason: what is wrong with it.
      keep: copies the file instead, where its readable part stays in use.

    Returns:
      The new name, `NAME.damaged`, or with a number behind it where that one is taken.

    Raises:
      StorageError: it cannot be renamed.
    """
    path = epath.Path(path)
    for number in itertools.count(1):
        aside = path.with_name(f"{path.name}.damaged{number if number > 1 else ''}")
        if not aside.exists():
            break
    with storage(path, "is damaged and cannot be renamed"):
        path.copy(aside) if keep else path.rename(aside)
    logging.warning("%s is damaged, and kept as %s: %s", path, aside.name, reason)
    return aside


def to_json(content: Any, indent: int | None = None) -> bytes:
    """Encodes JSON in UTF-8, whatever its texts hold.

    Half a surrogate pair, which UTF-8 cannot say, becomes JSON's escape of it: a model's tokens may
    end in the middle of a character. Numbers that are not finite become null: JSON has none, and a
    model that diverged has losses that are none.

    Args:
      content: what `json` can encode.
      indent: spaces of a level; None for one line.
    """
    try:
        text = json.dumps(content, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError:
        finite = _finite(content)
        text = json.dumps(finite, indent=indent, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", errors="backslashreplace")  # "\ud800", which is JSON's form too


def _finite(content: Any) -> Any:
    """Returns JSON-ready content with None in place of numbers that are not finite."""
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def to_json_lines(rows: Iterable[dict]) -> bytes:
    """Encodes rows as JSON lines, see `to_json`."""
    return b"".join(to_json(row) + b"\n" for row in rows)


def read_json(path: epath.PathLike, rename: bool = True) -> Any:
    """Reads a JSON file; a damaged one is set aside.

    Args:
      path: the file.
      rename: False to leave a damaged one as it is, where a command only reads.

    Returns:
      The content; None where there is no file, or only a damaged one.

    Raises:
      StorageError: the storage does not give it.
    """
    content = read(path)
    if content is None:
        return None
    try:
        return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # of JSON, nested too deep as well, and UTF-8
        if rename:
            set_aside(path, str(error))
        return None


def parse_lines(
    content: bytes, path: epath.PathLike, fields: Mapping[str, type] = types.MappingProxyType({})
) -> tuple[list[dict], str]:
    r"""Parses JSON lines, split at "\n" alone: other separators of lines are text of a string.

    Args:
      content: content of the file.
      path: name of the file, for messages.
      fields: what each row must have, with the type of its value.

    Returns:
      `(rows, what is wrong with the last line)`; "" for nothing. A last line that was cut off,
      with no end of its own, is no row.

    Raises:
      WorkdirError: another line is damaged.
    """
    lines = [(i, line) for i, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    rows = []
    for number, line in lines:
        try:
            row = json.loads(line.decode("utf-8"))
            if not isinstance(row, dict):
                raise ValueError(f"expected an object, found {row!r:.40}")
            for name, kind in fields.items():
                if not isinstance(row.get(name), kind) or isinstance(row[name], bool):
                    raise ValueError(
                        f"{name}: expected {kind.__name__}, found {row.get(name)!r:.40}"
                    )
        except (ValueError, RecursionError) as error:
            if number == lines[-1][0] and not content.endswith(b"\n"):
                return rows, f"line {number} is cut off ({error})"
            raise WorkdirError(
                f"{os.fspath(path)} line {number} is damaged ({error}): put the line right, or "
                "move the file away if what it holds is not needed."
            ) from None
        rows.append(row)
    return rows, ""
