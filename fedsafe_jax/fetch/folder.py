"""Data sets of the catalog in a data folder, and the record of what was downloaded there.

A file has its name only once it is whole and its hash is right. `fetched.json` says of each where
it came from, with the hash that it had: of files whose hash the catalog does not know, a later
command compares with that.
"""

import contextlib
import glob
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import filelock
import httpx2
from huggingface_hub import constants, hf_hub_url
from huggingface_hub.utils import build_hf_headers

from fedsafe_jax.data.catalog import DataFile, DataSet
from fedsafe_jax.data.examples import SourceError
from fedsafe_jax.fetch.contents import FORMS, Digest, digest, is_packed
from fedsafe_jax.fetch.download import Address, download, newest_commit
from fedsafe_jax.whole_files import (
    StorageError,
    make_folder,
    read_json,
    replaced,
    set_aside,
    storage,
    to_json,
    write,
)

RECORD = "fetched.json"
LOCK = ".fetch-data.lock"
BRANCH = "main"  # of the Hub, where no revision is known


class Servers(NamedTuple):
    """The servers that are asked.

    Attributes:
      hub: address of the Hub, or of a mirror.
      raw: address that serves files of GitHub's repositories by commit, or of a mirror.
      token: of the Hub; None without one. GitHub's server never gets it.
    """

    hub: str = "https://huggingface.co"
    raw: str = "https://raw.githubusercontent.com"
    token: str | None = None


class Reporter(NamedTuple):
    """Where progress goes.

    Attributes:
      say: called with a line of what was done.
      moved: called with a file's name, the bytes that are there, and all of them (or None).
    """

    say: Callable[[str], None]
    moved: Callable[[str, int, int | None], None]


def check_gates(sets: list[DataSet], servers: Servers) -> None:
    """Refuses gated data sets without a token, before anything is downloaded.

    Raises:
      SourceError: with what has to be done.
    """
    for one in sets:
        if one.gate and not servers.token:
            raise SourceError(f"{one.name}: {one.page} is gated, and no token is set: {one.gate}.")


def check_offline(sets: list[DataSet]) -> None:
    """Refuses data sets of the Hub where the environment says that it is not to be asked.

    Raises:
      SourceError: HF_HUB_OFFLINE is set.
    """
    for one in sets:
        if one.host == "hub" and constants.HF_HUB_OFFLINE:
            raise SourceError(
                f"{one.name}: comes from the Hub, and HF_HUB_OFFLINE is set; unset it."
            )


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
    """Keeps other commands from downloading into the folder.

    Raises:
      StorageError: one does so now, or the folder cannot be written to.
    """
    make_folder(folder)
    with storage(folder):
        try:
            lock = filelock.FileLock(folder / LOCK, timeout=0)
            lock.acquire()
        except filelock.Timeout:
            raise StorageError(
                f"{folder}: another command is downloading into it; wait for its end."
            ) from None
    try:
        yield
    finally:
        lock.release()


def fetch(
    http: httpx2.Client, one: DataSet, folder: pathlib.Path, servers: Servers, report: Reporter
) -> None:
    """Downloads what a folder lacks of a data set.

    Args:
      http: see `download.client`.
      one: the data set.
      folder: data folder; see `locked`.
      servers: who is asked.
      report: where progress goes.

    Raises:
      SourceError: a file is gone, gated, of another hash, or another one is in its place.
      StorageError: server or disk fail; the same command goes on.
    """
    revision = one.revision
    for file in one.files:
        target = folder / file.to
        if os.path.lexists(target):
            report.say(_checked(target, file, _recorded(folder).get(file.to, {})))
            continue
        make_folder(target.parent)
        if revision is None:
            revision = newest_commit(http, _address(one, file, servers, BRANCH))
        # The commit in its name keeps parts of two revisions from being put together.
        part = target.with_name(f"{target.name}.{revision[:12]}.part")
        had = _right(http, _address(one, file, servers, revision), file, part, report)
        _record(folder, one, file, revision, had)  # before a kill could leave the file without it
        with storage(target):
            with replaced(target) as new:
                FORMS[file.stored](part, new)
            for left in target.parent.glob(f"{glob.escape(target.name)}.*.part"):
                left.unlink(missing_ok=True)
        known = file.sha256 or file.git_blob
        how = "as the catalog has it" if known else f"none in the catalog, kept in {RECORD}"
        report.say(f"{target}: {had.size:,} bytes, sha256 {had.sha256} ({how})")


def _checked(target: pathlib.Path, file: DataFile, record: dict) -> str:
    """Says that a file is there, after a look at its hash.

    Raises:
      SourceError: another one is there.
    """
    if not target.is_file():
        raise SourceError(f"{target}: is no regular file; move it away.")
    with storage(target, "cannot be read"):
        there = digest(target, unpack=is_packed(file))
    known = (file.stored_sha256 or file.sha256, file.git_blob)
    if not any(known):
        known = (record.get("sha256"), None)
    if wrong := there.differs(*known):
        raise SourceError(
            f"{target}: is there, and is another file ({wrong}); move it away, or give another "
            "--data_dir. It stays as it is."
        )
    return f"{target}: is there already" + ("" if any(known) else f", unknown: {there.sha256}")


def _address(one: DataSet, file: DataFile, servers: Servers, revision: str) -> Address:
    headers, mirror = {}, "--raw_endpoint"
    url = f"{servers.raw}/{one.repo}/{revision}/{file.path}"
    if one.host == "hub":
        mirror = "--endpoint"
        where = {"repo_type": "dataset", "revision": revision, "endpoint": servers.hub}
        url = hf_hub_url(one.repo, file.path, **where)
        headers = build_hf_headers(token=servers.token or False)
    return Address(
        name=one.name,
        url=url,
        page=one.page,
        path=file.path,
        revision=revision,
        headers=headers,
        gate=one.gate,
        mirror=mirror,
    )


def _right(
    http: httpx2.Client,
    address: Address,
    file: DataFile,
    part: pathlib.Path,
    report: Reporter,
) -> Digest:
    """Downloads a file into `part`, and refuses it if its hash is wrong."""

    def moved(there: int, total: int | None) -> None:
        report.moved(file.to, there, total)

    goes_on = part.is_file() and part.stat().st_size > 0
    try:
        had, wrong = _whole(http, address, file, part, moved)
        if wrong and goes_on:  # what was left of an earlier download may be what is wrong
            os.truncate(part, 0)
            had, wrong = _whole(http, address, file, part, moved)
        if wrong:
            os.truncate(part, 0)
    finally:
        with contextlib.suppress(OSError):
            if part.stat().st_size == 0:
                part.unlink()
    if wrong:
        raise SourceError(
            f"{address.name}: {address.url} is another file than the catalog's ({wrong}): upstream "
            f"or a mirror has changed it. Nothing of it is kept; {address.mirror} names a mirror."
        )
    return had


def _whole(
    http: httpx2.Client,
    address: Address,
    file: DataFile,
    part: pathlib.Path,
    moved: Callable[[int, int | None], None],
) -> tuple[Digest, str]:
    """The digest of a downloaded file, and what is wrong with it."""
    said = download(http, address, part, file.size, moved)
    with storage(part, "cannot be read"):
        had = digest(part)
    if file.sha256 or file.git_blob:
        return had, had.differs(file.sha256, file.git_blob)
    return had, had.differs(said.sha256, said.git_blob)


def _recorded(folder: pathlib.Path) -> dict[str, dict]:
    """The entries of the record by file; a damaged record is set aside."""
    record = read_json(folder / RECORD)
    if record is not None and not (
        isinstance(record, dict) and all(isinstance(one, dict) for one in record.values())
    ):
        set_aside(folder / RECORD, "it is no object of objects")
        record = None
    return record or {}


def _record(folder: pathlib.Path, one: DataSet, file: DataFile, revision: str, had: Digest) -> None:
    record = _recorded(folder)
    record[file.to] = {
        "set": one.name,
        "from": one.page,
        "revision": revision,
        "path": file.path,
        "licence": one.licence,
        "size": had.size,
        "sha256": had.sha256,
        "stored": file.stored,
    }
    write(folder / RECORD, to_json(dict(sorted(record.items())), indent=1) + b"\n")
