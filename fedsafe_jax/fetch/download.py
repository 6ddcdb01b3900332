"""One file over HTTP into a `.part` file, which goes on where an earlier download has stopped.

The address names a commit, so the bytes behind it never change, and the rest of a file fits what is
there of it. Whoever asks for the file compares its hash before it gets its name.
"""

import os
import pathlib
import re
import shutil
import time
from collections.abc import Callable, Mapping
from typing import BinaryIO, NamedTuple

import httpx2

from fedsafe_jax.data.examples import SourceError
from fedsafe_jax.data.limits import MOST_BYTES
from fedsafe_jax.whole_files import StorageError, storage

PAUSES = (1.0, 3.0)  # seconds before the second and the third try
TIMEOUT = httpx2.Timeout(30, connect=10)
# A text that a server packs for the way could not go on in its middle.
PLAIN = {"Accept-Encoding": "identity"}
MOST_RENAMES = 5
BUSY = (408, 425, 429, 500, 502, 503, 504)
HASHES = {"sha256": r"[0-9a-f]{64}", "git_blob": r"[0-9a-f]{40}"}


class Address(NamedTuple):
    """Where a file is, with what errors have to say of it.

    Attributes:
      name: the data set.
      url: address of the file.
      page: page of its repository.
      path: its place there.
      revision: commit, or branch.
      headers: sent along; a token stays with the host of `url` when that leads elsewhere.
      gate: what has to be done before it can be had; None where nothing.
      mirror: flag that names another server.
    """

    name: str
    url: str
    page: str
    path: str
    revision: str
    headers: Mapping[str, str]
    gate: str | None
    mirror: str


class Said(NamedTuple):
    """What the server says of a file.

    Attributes:
      commit: commit that the Hub has served; None elsewhere.
      sha256: hash of the bytes, of a large file of the Hub; None elsewhere.
      git_blob: git's hash of the bytes, of a small one; None elsewhere.
    """

    commit: str | None = None
    sha256: str | None = None
    git_blob: str | None = None


class _Busy(Exception):
    """The server does not answer now, and may later."""


def client() -> httpx2.Client:
    """Returns an HTTP client, which reads proxies from the environment as usual."""
    return httpx2.Client(follow_redirects=True, timeout=TIMEOUT, headers=PLAIN)


def newest_commit(http: httpx2.Client, address: Address) -> str:
    """Returns the commit of the branch that the address names, as the Hub says it.

    Raises:
      SourceError: the server does not say it, or refuses.
      StorageError: the server cannot be reached.
    """
    said = _tried(address, lambda: _head(http, address))
    if not said.commit or not re.fullmatch(r"[0-9a-f]{7,64}", said.commit):
        raise SourceError(
            f"{address.name}: {address.url} does not say of which commit it is; ask the Hub itself "
            f"or another mirror by {address.mirror}."
        )
    return said.commit


def download(
    http: httpx2.Client,
    address: Address,
    part: pathlib.Path,
    size: int | None,
    moved: Callable[[int, int | None], None],
) -> Said:
    """Downloads a file, from the end of what an earlier download has left.

    Args:
      http: see `client`.
      address: of the file.
      part: what is there of it; whole at the return, unless the hash says otherwise.
      size: bytes of the file; None where it is not known.
      moved: called with the bytes that are there, and all of them (None where not known).

    Returns:
      What the server says of the file.

    Raises:
      SourceError: the file is gone, gated, or of another size.
      StorageError: the server cannot be reached or stops in the middle, or the disk is full; what
        has come stays in `part`.
    """
    with storage(part), open(part, "ab") as file:
        return _tried(
            address,
            lambda: _rest(http, address, file, size, moved),
            lambda: f"; {file.tell():,} bytes have come, and the same command goes on there",
        )


def _tried(address: Address, once: Callable[[], Said], kept: Callable[[], str] = str) -> Said:
    """The outcome of up to three tries."""
    for pause in (*PAUSES, None):
        try:
            return once()
        except (httpx2.TransportError, _Busy) as error:
            if pause is None:
                unreached = isinstance(error, (httpx2.ConnectError, httpx2.ConnectTimeout))
                failed = "cannot be reached" if unreached else "has stopped answering"
                why = " ".join(str(error).split()) or type(error).__name__
                hint = f" Is there a network? {address.mirror} names a mirror." if unreached else ""
                raise StorageError(
                    f"{address.name}: {address.url} {failed} ({why}){kept()}.{hint}"
                ) from None
            time.sleep(pause)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise SourceError(f"{address.name}: {address.url}: {error}") from None
    raise AssertionError


def _head(http: httpx2.Client, address: Address) -> Said:
    reply = http.head(address.url, headers=dict(address.headers), follow_redirects=False)
    # A renamed repository leads to its new name; where a large file lies need not be asked.
    for _ in range(MOST_RENAMES):
        if reply.next_request is None or "X-Repo-Commit" in reply.headers:
            break
        reply = http.send(reply.next_request, follow_redirects=False)
    _check(reply, address)
    return _said([reply])


def _rest(
    http: httpx2.Client,
    address: Address,
    file: BinaryIO,
    size: int | None,
    moved: Callable[[int, int | None], None],
) -> Said:
    """One request, for what is not there yet."""
    there = file.seek(0, os.SEEK_END)
    if size is not None and there > size:
        there = _emptied(file)
    asked = {"Range": f"bytes={there}-"} if there else {}
    with http.stream("GET", address.url, headers={**address.headers, **asked}) as reply:
        total = _total(reply)
        if reply.status_code == 416 and total == there:
            return _said([*reply.history, reply])  # all of it had come before
        if reply.status_code == 416 or (reply.status_code == 206 and _start(reply) != there):
            _emptied(file)
            raise _Busy("it has served another part than was asked for")
        _check(reply, address)
        if reply.status_code == 200:
            there = _emptied(file)  # it serves whole files alone
        if size is not None and total is not None and total != size:
            raise SourceError(
                f"{address.name}: {address.url} has {total:,} bytes, the catalog {size:,}: another "
                "file is served. Nothing of it is kept."
            )
        total = size if total is None else total
        _check_room(file, there, total)
        for piece in reply.iter_raw():
            there += file.write(piece)
            if there > (MOST_BYTES if total is None else total):
                _emptied(file)
                raise SourceError(f"{address.name}: {address.url} sends more than it should.")
            moved(there, total)
        file.flush()
        if total is not None and there < total:
            raise _Busy("it has hung up")
        if total is None and reply.headers.get("Transfer-Encoding", "") != "chunked":
            _emptied(file)  # a half would look like the whole
            raise SourceError(f"{address.name}: {address.url} does not say how long the file is.")
        return _said([*reply.history, reply])


def _emptied(file: BinaryIO) -> int:
    """Takes all bytes out of a file, and returns how many are left."""
    file.seek(0)
    return file.truncate()


def _check_room(file: BinaryIO, there: int, total: int | None) -> None:
    """Asks the disk before the server sends anything."""
    free = shutil.disk_usage(os.path.dirname(os.path.abspath(file.name))).free
    if total is not None and total - there > free:
        raise StorageError(
            f"{file.name}: {total - there:,} bytes are to come, and the disk has room for {free:,}."
        )


def _start(reply: httpx2.Response) -> int | None:
    """The place of the reply's first byte in the file."""
    told = re.match(r"bytes (\d+)-", reply.headers.get("Content-Range", ""))
    return int(told[1]) if told else None


def _total(reply: httpx2.Response) -> int | None:
    """Bytes of the whole file, by the reply's headers."""
    told = re.search(r"/(\d+)$", reply.headers.get("Content-Range", ""))
    if told or reply.status_code != 200:
        return int(told[1]) if told else None
    length = reply.headers.get("Content-Length", "")
    return int(length) if length.isdigit() else None


def _said(replies: list[httpx2.Response]) -> Said:
    """What the Hub's headers say; they are on the reply that leads to where a large file lies."""
    known: dict[str, str] = {}
    for reply in replies:
        if commit := reply.headers.get("X-Repo-Commit"):
            known.setdefault("commit", commit)
            etag = reply.headers.get("X-Linked-ETag") or reply.headers.get("ETag") or ""
            etag = etag.removeprefix("W/").strip('"')
            for name, form in HASHES.items():
                if re.fullmatch(form, etag):
                    known.setdefault(name, etag)
    return Said(**known)


def _check(reply: httpx2.Response, address: Address) -> None:
    """Raises what a reply without the file means."""
    status, code = reply.status_code, reply.headers.get("X-Error-Code", "")
    if status in BUSY:
        raise _Busy(f"HTTP {status}")
    where = f"{address.name}: {address.page}"
    at = f"{address.path} at revision {address.revision}"
    if code == "GatedRepo" or (status in (401, 403) and address.gate):
        reached = "the token's account has no access" if _has_token(address) else "no token is set"
        gate = address.gate or "accept its terms on its page, then set HF_TOKEN"
        raise SourceError(f"{where} is gated, and {reached}: {gate}.")
    if code == "RevisionNotFound":
        raise SourceError(
            f"{where}: revision {address.revision} is gone; {address.mirror} may name a mirror "
            "that still has it."
        )
    if code == "RepoNotFound" or status in (401, 403):
        raise SourceError(f"{where}: gone, private, or not open to this token (HTTP {status}).")
    if status in (404, 410):
        what = f"has no {at}" if code == "EntryNotFound" else f"has no {at}: one of them is gone"
        raise SourceError(f"{where} {what} (HTTP {status}).")
    if status >= 400:
        raise SourceError(f"{address.name}: {address.url} answers HTTP {status}.")
    encoding = reply.headers.get("Content-Encoding", "identity")
    if reply.headers.get("Content-Type", "").startswith("text/html") or encoding != "identity":
        raise SourceError(
            f"{address.name}: {address.url} answers with a web page or packed text instead of the "
            "file; a proxy or a page of a network's login may stand between."
        )


def _has_token(address: Address) -> bool:
    return any(name.lower() == "authorization" for name in address.headers)
