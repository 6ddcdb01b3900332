"""Bytes of downloaded files: their hashes, and the form they are stored in."""

import gzip
import hashlib
import os
import pathlib
import shutil
import zlib
from collections.abc import Callable
from typing import NamedTuple

from fedsafe_jax.data.catalog import DataFile
from fedsafe_jax.data.examples import SourceError
from fedsafe_jax.data.limits import MOST_BYTES
from fedsafe_jax.data.packed_files import read_bytes

PIECE = 2**20  # bytes that are read at once
GZIP_LEVEL = 9
EVERY = 10


class Digest(NamedTuple):
    """Size and hashes of some bytes: SHA-256, and SHA-1 as git hashes a file."""

    size: int
    sha256: str
    git_blob: str

    def differs(self, sha256: str | None, git_blob: str | None) -> str:
        """Says in what the bytes are not those that are expected; "" where they are.

        Args:
          sha256: expected; None where it is not known.
          git_blob: expected where no SHA-256 is; None where it is not known either.
        """
        if sha256:
            return "" if self.sha256 == sha256 else f"sha256 {self.sha256}, expected {sha256}"
        if git_blob:
            return "" if self.git_blob == git_blob else f"git {self.git_blob}, expected {git_blob}"
        return ""


def digest(path: pathlib.Path, unpack: bool = False) -> Digest:
    """Returns size and hashes of a file.

    Args:
      path: the file.
      unpack: reads what is inside a gzip file instead: the same text has other bytes where another
        version of zlib has packed it.

    Raises:
      SourceError: no gzip file, or a damaged one.
      OSError: the file cannot be read.
    """
    try:
        # Git hashes the size first, so that of a packed file has to be counted before.
        size = sum(map(len, _pieces(path, unpack))) if unpack else os.path.getsize(path)
        sha256, sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        for piece in _pieces(path, unpack):
            sha256.update(piece)
            sha1.update(piece)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise SourceError(f"{path}: damaged, or no gzip file ({error}). Move it away.") from None
    return Digest(size, sha256.hexdigest(), sha1.hexdigest())


def _pieces(path: pathlib.Path, unpack: bool):
    counted = 0
    with gzip.open(path) if unpack else open(path, "rb") as file:
        while piece := file.read(PIECE):
            counted += len(piece)
            if unpack and counted > MOST_BYTES:
                raise SourceError(f"{path}: unpacks to more than {MOST_BYTES:,} bytes.")
            yield piece


def is_packed(file: DataFile) -> bool:
    """Returns whether the stored file is one that was packed here."""
    return file.stored != "as_it_is"


def as_it_is(part: pathlib.Path, new: pathlib.Path) -> None:
    """Stores upstream's bytes."""
    os.replace(part, new)


def gzipped(part: pathlib.Path, new: pathlib.Path) -> None:
    """Stores upstream's bytes packed by gzip, without name and time: the same at every place."""
    with open(part, "rb") as source:
        _pack(new, lambda packed: shutil.copyfileobj(source, packed, PIECE))


def every_10th_line(part: pathlib.Path, new: pathlib.Path) -> None:
    """Stores lines 1, 11, 21, ... of the JSON lines alone in a zip archive, packed by gzip.

    Raises:
      SourceError: no zip archive with one text.
    """
    archive = new.with_suffix(".zip")  # its name says how to read it
    os.replace(part, archive)
    lines = [line for line in read_bytes(archive)[1].split(b"\n") if line.strip()]
    archive.unlink()
    _pack(new, lambda packed: packed.writelines(line + b"\n" for line in lines[::EVERY]))


def _pack(new: pathlib.Path, write: Callable[[gzip.GzipFile], object]) -> None:
    with open(new, "wb") as raw, gzip.GzipFile("", "wb", GZIP_LEVEL, raw, mtime=0) as packed:
        write(packed)


FORMS: dict[str, Callable[[pathlib.Path, pathlib.Path], None]] = {
    "as_it_is": as_it_is,
    "gzip": gzipped,
    "every_10th_line": every_10th_line,
}
