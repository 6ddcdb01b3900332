"""Bytes of files, plain, gzipped or alone in a zip archive, never more than `limits` allows.

Unpacked text is read in pieces and counted, so that a bomb costs no more than the limit.
"""

import gzip
import io
import pathlib
import stat
import zipfile
from typing import BinaryIO

from fedsafe_jax.data import limits
from fedsafe_jax.data.examples import SourceError

READABLE = (".json", ".jsonl", ".csv", ".txt")
PIECE = 2**20  # bytes that are unpacked at once
# Compressions of zip archives that are unpacked piece by piece; others take a whole block at once,
# which may be a thousand times as large as what it is packed in.
IN_PIECES = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def read_bytes(path: pathlib.Path) -> tuple[str, bytes]:
    """Reads a file, and unpacks it where its name ends in .gz or .zip.

    Args:
      path: a regular file, or a link to one.

    Returns:
      `(name, bytes)`, `name` being that of what is inside.

    Raises:
      SourceError: no regular file, too large, damaged, or more than one text in an archive.
    """
    try:
        if not stat.S_ISREG((about := path.stat()).st_mode):
            raise SourceError(f"{path}: is no regular file; give a file with text.")
        packed = about.st_size
        _check_size(path, packed)
        with open(path, "rb") as file:
            data = file.read(limits.MOST_BYTES + 1)  # it may grow, or be one of /proc
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({_words(error)}).") from None
    _check_size(path, len(data))
    if path.suffix not in (".gz", ".zip"):
        return path.name, data
    most = min(limits.MOST_BYTES, max(limits.FREE_BYTES, limits.MOST_RATIO * len(data)))
    try:
        if path.suffix == ".gz":
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as inside:
                return path.stem, unpacked(path, inside, len(data), most)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            member = _member(path, archive)
            with archive.open(member) as inside:
                return member.filename, unpacked(path, inside, len(data), most)
    except SourceError:
        raise
    except (NotImplementedError, RuntimeError) as error:  # encrypted, or a rare compression
        raise SourceError(f"{path}: cannot be unpacked ({_words(error)}).") from None
    except Exception as error:  # damaged bytes raise a dozen unrelated types in these libraries
        raise SourceError(
            f"{path}: damaged, or no {path.suffix} file ({_words(error)}). Pack or copy it again."
        ) from None


def _member(path: pathlib.Path, archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    """The one text of an archive."""
    members = [m for m in archive.infolist() if not m.is_dir()]
    members = [m for m in members if not m.filename.startswith("__MACOSX")]
    texts = [m for m in members if pathlib.PurePath(m.filename).suffix in READABLE]
    if len(texts) != 1:
        names = repr([m.filename for m in (texts or members)[:9]])
        raise SourceError(
            f"{path}: expected one file of {', '.join(READABLE)} inside, found {names[:60]}."
        )
    if texts[0].compress_type not in IN_PIECES:
        raise SourceError(
            f"{path}: packed by a method that zip programs seldom use; pack it by deflate, the "
            "usual one."
        )
    return texts[0]


def unpacked(path: pathlib.Path, inside: BinaryIO, packed: int, most: int) -> bytes:
    """Reads what is inside of a packed file, unless it is more than `most`.

    Args:
      path: the packed file, named in the error.
      inside: what is read.
      packed: bytes of the packed file.
      most: bytes that are read.

    Raises:
      SourceError: there are more.
    """
    pieces, size = [], 0
    while piece := inside.read(PIECE):
        size += len(piece)
        if size > most:
            raise SourceError(
                f"{path}: unpacks to more than {most:,} bytes from {packed:,} (at most "
                f"{limits.MOST_RATIO} times the packed size, and {limits.MOST_BYTES:,} bytes, are "
                "read). If it is no mistake, unpack it, or split it into several sources."
            )
        pieces.append(piece)
    return b"".join(pieces)


def _check_size(path: pathlib.Path, size: int) -> None:
    if size > limits.MOST_BYTES:
        raise SourceError(
            f"{path}: has {size:,} bytes; at most {limits.MOST_BYTES:,} are read. Split it into "
            "several sources."
        )


def _words(error: BaseException) -> str:
    """The error's own words in one line, or its type where it has none."""
    return " ".join(str(error).split())[:200] or type(error).__name__
