"""Folders of a user's own: that of a run, and those of compiled programs and converted models.

Who may write to a run's folder can change its checkpoints, plant links that the run writes through,
and read answers to harmful prompts. Who may write to compiled programs runs code as this user.
"""

import logging
import os
import pathlib
import stat
from collections.abc import Mapping

from etils import epath

from fedsafe_jax import whole_files
from fedsafe_jax.whole_files import WorkdirError

PRIVATE = 0o700


def claim_workdir(workdir: epath.PathLike) -> None:
    """Creates a run's folder for its user alone; an existing one is checked and keeps its mode.

    It must hold no link that leads out of it, so that whatever is written below it stays there. A
    folder that its group may write to, and one that root uses of another user, gets a warning:
    both may be meant, on machines of a team and in containers. Buckets have rules of their own.

    Args:
      workdir: folder of the run.

    Raises:
      WorkdirError: anybody may write to it or replace it, it is another user's, or a link in it
        leads elsewhere.
      StorageError: it cannot be created or read.
    """
    if "://" in os.fspath(workdir):
        return
    path = make_private(workdir)
    with whole_files.storage(path, "cannot be read"):
        fault, link = _fault(path), _link_outwards(path)
        others, owner = _open_to_all(path), path.stat().st_uid
    if link is not None:
        raise WorkdirError(
            f"--workdir={workdir}: {link} is a link to {os.path.realpath(link)}, out of the folder "
            "of the run, which would be written to. Remove the link; --workdir itself may be one."
        )
    if not fault:
        return
    line = f"--workdir={workdir}: {fault}, so what the run keeps there is not safe from others."
    mend = f"Take that right away (chmod go-w {others}), or name" if others else "Name"
    if others or (owner not in (os.geteuid(), 0) and os.geteuid()):
        raise WorkdirError(f"{line} {mend} a folder that is not there yet, below one of your own.")
    logging.warning("%s", line)


def make_private(folder: epath.PathLike) -> pathlib.Path:
    """Returns a local folder without links in its name; created for its user alone if missing.

    Raises:
      WorkdirError: it is a file, or lies below one.
      StorageError: it cannot be created.
    """
    path = pathlib.Path(folder)
    if not path.is_dir():
        whole_files.make_folder(path.parent)
        with whole_files.storage(path):
            try:
                path.mkdir(mode=PRIVATE, exist_ok=True)  # never open to others, not for a moment
            except (FileExistsError, NotADirectoryError):
                pass
        whole_files.make_folder(path)
    return path.resolve()


def cache(name: str, environment: Mapping[str, str] = os.environ) -> pathlib.Path:
    """Returns a folder of the user's cache, created for the user alone if missing.

    Args:
      name: what the folder holds.
      environment: environment variables by name; XDG_CACHE_HOME in place of `~/.cache`.

    Returns:
      `~/.cache/fedsafe_jax/NAME`.

    Raises:
      WorkdirError: others may write to it, or it cannot be created.
    """
    home = environment.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = pathlib.Path(home, "fedsafe_jax", name)
    if not folder.is_absolute():
        raise WorkdirError(f"{folder}: there is no home folder.")
    try:
        make_private(folder.parent)
        make_private(folder)
        why = why_not_private(folder)
    except OSError as error:
        raise WorkdirError(str(error)) from error
    if why:
        raise WorkdirError(f"{why}.")
    return folder


def why_not_private(folder: epath.PathLike) -> str:
    """Returns the reason for which a local folder is open to others; "" where it is not.

    Raises:
      OSError: the folder cannot be read.
    """
    return _fault(pathlib.Path(folder).resolve())


def _fault(path: pathlib.Path) -> str:
    opened = _open_to_all(path)
    status = path.stat()
    if opened:
        return f"anybody may write to {opened}"
    if status.st_uid not in (os.geteuid(), 0):  # root may write everywhere as it is
        return f"{path} belongs to another user (uid {status.st_uid})"
    return f"its group may write to {path}" if status.st_mode & stat.S_IWGRP else ""


def _open_to_all(path: pathlib.Path) -> pathlib.Path | None:
    """Returns the folder, or one above it, in which anybody may replace what is not theirs.

    In a shared temporary directory nobody may: it has the sticky bit. Below it files may be
    created, so the folder itself must not be one.
    """
    if path.stat().st_mode & stat.S_IWOTH:
        return path
    for above in path.parents:
        mode = above.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            return above
    return None


def _link_outwards(path: pathlib.Path) -> pathlib.Path | None:
    """Returns the first link below a folder that leads out of it, None without one."""
    for folder, folders, files in os.walk(path):
        for name in sorted(folders) + sorted(files):
            entry = pathlib.Path(folder, name)
            if entry.is_symlink() and not entry.resolve().is_relative_to(path):
                return entry
    return None
