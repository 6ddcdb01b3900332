"""The owner of a workdir: `owner.json` says which run writes there, and that it lives.

A second run in the same workdir is refused. The file has no lock, which buckets and network disks
do not have: it is created where there is none, read back, and renewed every half minute. A run that
was killed leaves it behind; the next run takes over at once where it can see that the process is
gone, else ten minutes after the last sign of life, when none has come for another minute. The
processes of one run on several hosts have
one owner, the first of them.
"""

import contextlib
import datetime
import json
import logging
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Iterator

from etils import epath

from fedsafe_jax import whole_files
from fedsafe_jax.runtime import multihost, preemption
from fedsafe_jax.whole_files import StorageError

NAME = "owner.json"
RENEWED_S = 30.0
STALE_S = 600.0
WATCHED_S = 2 * RENEWED_S  # clocks of hosts differ and jump: what is renewed meanwhile is alive
SETTLED_S = 1.0  # two runs that start together have both written after this time


class InUseError(StorageError):
    """Another run writes to the workdir."""


class Owner:
    """This run as the owner of a workdir; one of the first process alone.

    Args:
      workdir: folder of the run.

    Raises:
      InUseError: another run has the workdir; the message says which, since when, and what to do.
      StorageError: the storage does not take the file.
    """

    def __init__(self, workdir: epath.Path):
        self._path = workdir / NAME
        self._content = {"run": uuid.uuid4().hex} | _this_process()
        self._content["started"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._lost = ""
        self._claim()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="owner", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Checks that this run still has the workdir.

        A process that was suspended for long finds that another run went on in its place.

        Raises:
          InUseError: another run has taken over.
        """
        if self._lost:
            raise InUseError(self._lost)

    def release(self) -> None:
        """Gives the workdir back."""
        self._ended.set()
        self._thread.join(timeout=10.0)
        try:
            if _run_of(_read(self._path)) == self._content["run"]:
                if _is_local(self._path):  # while this run has it, no other one is claiming it
                    whole_files.remove_left(pathlib.Path(self._path.parent), NAME)
                with whole_files.storage(self._path, "cannot be removed"):
                    self._path.unlink(missing_ok=True)
        except StorageError as error:
            logging.warning("%s The next run here waits until it is stale.", error)

    def _claim(self) -> None:
        whole_files.make_folder(self._path.parent)
        self._content["heartbeat"] = time.time()
        for _ in range(3):  # a claim can lose against another one that takes over as well
            there = _read(self._path)
            if there is not None:
                if not _is_gone(there) and not self._stays_silent(there):
                    raise InUseError(_refusal(self._path, _read(self._path) or there))
                self._take_away(there)
            if not _create(self._path, self._content):
                continue
            if not _is_local(self._path):
                time.sleep(SETTLED_S)
            there = _read(self._path)
            if _run_of(there) == self._content["run"]:
                self._remove_left()
                return
        raise InUseError(_refusal(self._path, there or {}))

    def _remove_left(self) -> None:
        """Removes what a killed run left half-written; another one may be looking at `NAME` now."""
        if _is_local(self._path):
            for folder, _, _ in os.walk(self._path.parent):
                whole_files.remove_left(pathlib.Path(folder), but=NAME)

    def _stays_silent(self, there: dict) -> bool:
        """Returns whether an owner that cannot be seen from here has ended, by its signs of life.

        A clock alone does not decide: a run whose file changes while this one looks at it lives.
        """
        if _lives(there) or not _is_silent(there):
            return False
        logging.warning(
            "%s is of a run on another host without a sign of life for long; it is taken over if "
            "none comes within %.0f s.",
            self._path,
            WATCHED_S,
        )
        time.sleep(WATCHED_S)
        return _read(self._path) in (there, None)

    def _take_away(self, stale: dict) -> None:
        """Removes the file of a run that is gone, unless another run has replaced it meanwhile."""
        with whole_files.storage(self._path):
            if not _is_local(self._path):
                self._path.unlink(missing_ok=True)
                return
            aside = self._path.with_name(f"{NAME}.{self._content['run']}")
            try:
                # Of two runs that take over, a rename succeeds in one alone.
                self._path.rename(aside)
            except FileNotFoundError:
                return
            if _run_of(_read(aside)) != _run_of(stale):
                with contextlib.suppress(FileExistsError):
                    os.link(aside, self._path)
            aside.unlink(missing_ok=True)

    def _renew(self) -> None:
        while not self._ended.wait(RENEWED_S):
            try:
                there = _read(self._path)
                if there and _run_of(there) != self._content["run"]:
                    self._lost = _refusal(self._path, there)
                    return
                self._content["heartbeat"] = time.time()
                whole_files.write(self._path, whole_files.to_json(self._content, indent=1))
            except StorageError as error:
                logging.warning("%s It is tried again.", error)


@contextlib.contextmanager
def owned(workdir: epath.Path) -> Iterator[Owner | None]:
    """Has a workdir for the time of the block; in all processes of a run.

    Args:
      workdir: folder of the run, created if missing.

    Yields:
      The owner in the first process; None in others.

    Raises:
      InUseError, StorageError: see `Owner`; every process raises.
    """
    owner = None
    try:
        with preemption.hold():  # a signal may come when the file is there, and nobody has it yet
            owner = multihost.first(lambda: Owner(workdir))
        yield owner
    finally:
        if owner is not None:
            with preemption.hold():
                owner.release()


def _is_local(path: epath.Path) -> bool:
    return "://" not in os.fspath(path)


def _create(path: epath.Path, content: dict) -> bool:
    """Writes the file if there is none; returns whether it did."""
    encoded = whole_files.to_json(content, indent=1)
    if not _is_local(path):
        whole_files.write(path, encoded)
        return True
    return whole_files.create(path, encoded)


def _read(path: epath.Path) -> dict | None:
    """Returns what the file says, None without a file, {} with the time of one that says nothing.

    A file that another run creates at this moment may still be empty.
    """
    for _ in range(3):
        content = whole_files.read(path)
        if content is None:
            return None
        with contextlib.suppress(ValueError):
            there = json.loads(content.decode("utf-8"))
            if isinstance(there, dict):
                return there
        time.sleep(0.1)
    with contextlib.suppress(OSError):
        return {"heartbeat": float(path.stat().mtime)}
    return {}


def _run_of(content: dict | None) -> str | None:
    return content.get("run") if content else None


def _this_process() -> dict:
    """Names this process such that another one on the same host can see whether it lives."""
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "process": os.getpid(),
        "process_start": _start_of(os.getpid()),
    }


def _machine() -> str:
    """Names the boot and the namespace within which a number names a process; "" if not known."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_of(process: int) -> str:
    """Returns when a process started, in ticks since boot; "" where it is gone or not known."""
    try:
        stat = pathlib.Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()  # the name before may hold spaces
    return "" if fields[0] == "Z" else fields[19]  # a zombie has ended


def _is_here(owner: dict) -> bool:
    here = _this_process()
    return owner.get("host") == here["host"] and owner.get("machine") == here["machine"]


def _is_gone(owner: dict) -> bool:
    """Returns whether it can be seen from here that the run of an owner file has ended."""
    if not _is_here(owner):
        return False
    if owner["machine"]:
        started = owner.get("process_start")
        return bool(started) and _start_of(owner.get("process", 0)) != started
    if os.name != "posix":
        return False
    try:
        os.kill(int(owner.get("process", 0)), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, TypeError):
        pass  # it is there, and another user's
    return False


def _lives(owner: dict) -> bool:
    """Returns whether it can be seen from here that the process of an owner file is there."""
    started = owner.get("process_start")
    is_seen = bool(started) and _is_here(owner) and bool(owner["machine"])
    return is_seen and _start_of(owner.get("process", 0)) == started


def _is_silent(owner: dict) -> bool:
    """Returns whether the last sign of life is old, by this host's clock."""
    beat = owner.get("heartbeat")
    # One that is far ahead is as silent as one that is far behind.
    return not isinstance(beat, int | float) or abs(time.time() - beat) > STALE_S


def _refusal(path: epath.Path, owner: dict) -> str:
    who = f"process {owner.get('process', '?')} on {owner.get('host', 'an unknown host')}"
    beat = owner.get("heartbeat")
    silent = max(0, round(time.time() - beat)) if isinstance(beat, int | float) else "?"
    return (
        f"--workdir={path.parent} is in use by {who} since {owner.get('started', '?')} "
        f"(last sign of life {silent} s ago). Wait until that run ends, or end it, or choose "
        f"another --workdir; if it was killed on another host, the same command goes on "
        f"{STALE_S / 60:.0f} minutes after that sign."
    )
