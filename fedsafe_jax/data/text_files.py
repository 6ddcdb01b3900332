"""Text of files as users have them, and the JSON and CSV in it; what is wrong is one line.

The only reader of text that is given to the package: it knows byte order marks, compression,
damaged archives and the encodings that spreadsheets write.
"""

import codecs
import csv
import gzip
import io
import json
import pathlib
import sys
import zipfile
import zlib

from absl import logging

from fedsafe_jax.data.examples import SourceError

READABLE = (".json", ".jsonl", ".csv", ".txt")
# The longer mark first: that of UTF-32 begins as that of UTF-16 does.
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def shorten(value: object, length: int = 60) -> str:
    """Returns the start of a value's `repr`, which has no line breaks, to show in an error."""
    shown = repr(value)
    return shown if len(shown) <= length else shown[: length - 3] + "..."


def one_line(error: BaseException) -> str:
    """Returns an error's own words in one line, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def read_text(path: pathlib.Path) -> tuple[str, str]:
    """Reads a text file, plain, gzipped or alone in a zip archive.

    UTF-8 is read with or without a byte order mark; UTF-16 and UTF-32 with their mark, which is
    noted in the log. Nothing else is guessed at.

    Args:
      path: file.

    Returns:
      `(name, text)`, `name` being that of the text inside, whose ending tells its form.

    Raises:
      SourceError: the file cannot be read, unpacked or decoded; the message names the line.
    """
    try:
        if path.suffix == ".zip":
            name, data = _from_zip(path)
        elif path.suffix == ".gz":
            name, data = path.stem, gzip.decompress(path.read_bytes())
        else:
            name, data = path.name, path.read_bytes()
    except (zipfile.BadZipFile, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise SourceError(
            f"{path}: damaged, or no {path.suffix} file ({one_line(error)}). Pack or copy it again."
        ) from None
    except (NotImplementedError, RuntimeError) as error:  # encrypted, or a rare compression
        raise SourceError(f"{path}: cannot be unpacked ({one_line(error)}).") from None
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({one_line(error)}).") from None
    return name, decode(data, path)


def _from_zip(path: pathlib.Path) -> tuple[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        members = [m.filename for m in archive.infolist() if not m.is_dir()]
        members = [m for m in members if not m.startswith("__MACOSX")]
        texts = [m for m in members if pathlib.PurePath(m).suffix in READABLE]
        if len(texts) != 1:
            raise SourceError(
                f"{path}: expected one file of {', '.join(READABLE)} inside, found "
                f"{shorten(texts or members)}."
            )
        return texts[0], archive.read(texts[0])


def decode(data: bytes, path: pathlib.Path) -> str:
    """Decodes a file's bytes, see `read_text`.

    Raises:
      SourceError: the bytes are in another encoding; names file, line and byte, and what to do.
    """
    encoding = next((name for mark, name in MARKS if data.startswith(mark)), "utf-8")
    if encoding.startswith("utf-8") and (zero := data.find(b"\0")) >= 0:
        line = data.count(b"\n", 0, zero) + 1
        raise SourceError(
            f"{path} line {line}: holds a NUL character, so it is no text, or UTF-16 without a "
            "byte order mark: save it as UTF-8."
        )
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SourceError(
            f"{path} line {line}: not {encoding.removesuffix('-sig').upper()} ({error.reason} at "
            f"byte {error.start}, {data[error.start]:#04x}). If a spreadsheet wrote it, it is "
            "probably Windows-1252: save it as UTF-8, or run iconv -f WINDOWS-1252 -t UTF-8."
        ) from None
    if encoding not in ("utf-8", "utf-8-sig"):
        logging.warning("%s: read as %s, which its byte order mark says.", path, encoding.upper())
    return text


def _without_twins(pairs: list[tuple[str, object]]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {shorten(twin)} occurs twice")
    return row


def _constant(name: str) -> None:
    """NaN is what pandas writes for a missing value; infinities stand for nothing."""
    if name != "NaN":
        raise ValueError(f"{name} is not a JSON number")


def parse_json(text: str):
    """Parses JSON. Returns its value, NaN as None.

    Raises:
      ValueError: not JSON, a key twice in an object, an infinity, or deeper than can be read.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_twins, parse_constant=_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def csv_rows(path: pathlib.Path, text: str) -> list[tuple[str, dict[str, str]]]:
    """Reads the rows of a CSV file, `(place, row)`; a cell that a short row lacks is "".

    Raises:
      SourceError: a name of a column occurs twice, columns are not separated by commas, a row has
        too many cells, or a quote is open.
    """
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # The module's own is 131,072.
    number = 1
    rows = []
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), restval="", strict=True)
        names = reader.fieldnames or []
        if twins := sorted({name for name in names if names.count(name) > 1}):
            raise SourceError(f"{path} row 1: the column {shorten(twins[0])} occurs twice.")
        if len(names) == 1 and (other := next((c for c in ";\t" if c in names[0]), "")):
            raise SourceError(
                f"{path} row 1: the columns are separated by {other!r}, as spreadsheets do in some "
                "languages; save it with commas between them."
            )
        for number, row in enumerate(reader, 2):
            if None in row:
                raise SourceError(
                    f"{path} row {number}: {len(row[None])} more cells than the {len(names)} "
                    f"columns {shorten(names, 200)}; put text with commas in double quotes."
                )
            rows.append((f"{path} row {number}", row))
    except csv.Error as error:
        raise SourceError(f"{path} row {number + 1}: not CSV ({one_line(error)}).") from None
    finally:
        csv.field_size_limit(before)
    return rows
