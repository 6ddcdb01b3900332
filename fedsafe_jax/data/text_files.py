"""Text of files as users have them, and the JSON and CSV in it; what is wrong is one line.

The only reader of text that is given to the package: it knows byte order marks, the encodings that
spreadsheets write, and how much of what may be in a file (`limits`). `packed_files` unpacks.
"""

import codecs
import csv
import io
import json
import math
import pathlib

from absl import logging

from fedsafe_jax.data import limits
from fedsafe_jax.data.examples import SourceError
from fedsafe_jax.data.packed_files import read_bytes

OTHER_PACKERS = (".bz2", ".xz", ".zst", ".lzma", ".7z", ".rar", ".tar", ".tgz", ".gz", ".zip")
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
    # The start of a text is enough: the whole may have a million characters.
    shown = repr(value[: length + 1] if isinstance(value, str) else value)
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
    name, data = read_bytes(path)
    if (suffix := pathlib.PurePath(name).suffix) in OTHER_PACKERS:
        raise SourceError(f"{path}: {suffix} is not unpacked; pack it as .gz or .zip.")
    return name, decode(data, path)


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
        before: set[str] = set()
        twin = next(name for name, _ in pairs if name in before or before.add(name))
        raise ValueError(f"the key {shorten(twin)} occurs twice")
    return row


def _constant(name: str) -> None:
    """NaN is what pandas writes for a missing value; infinities stand for nothing."""
    if name != "NaN":
        raise ValueError(f"{name} is not a JSON number")


def _integer(digits: str) -> int:
    if len(digits) > limits.MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits; at most {limits.MOST_DIGITS} are read")
    return int(digits)


def _fraction(digits: str) -> float:
    if len(digits) > limits.MOST_DIGITS or math.isinf(number := float(digits)):
        raise ValueError(f"the number {digits[:20]} is too large or too long to be read")
    return number


def check_amount(text: str) -> None:
    """Checks how many rows or values a text may hold, before memory is taken for them.

    Raises:
      ValueError: more than `limits` allows.
    """
    lines = max(text.count("\n"), text.count("\r"))
    values = sum(map(text.count, "[{,")) if len(text) > limits.MOST_VALUES else 0
    for count, most, what in (
        (lines, limits.MOST_ROWS, "lines"),
        (values, limits.MOST_VALUES, "values"),
    ):
        if count > most:
            raise ValueError(f"{count:,} {what}; at most {most:,} are read: split it into several")


def parse_json(text: str):
    """Parses JSON. Returns its value, NaN as None.

    Raises:
      ValueError: not JSON, a key twice in an object, an infinity, a number of too many digits, or
        more values or deeper ones than `limits` allows.
    """
    check_amount(text)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_without_twins,
            parse_constant=_constant,
            parse_int=_integer,
            parse_float=_fraction,
        )
    except RecursionError:
        value = None
    else:
        if text.count("[") + text.count("{") <= limits.MOST_NESTED or not _is_deep(value):
            return value
    raise ValueError(
        f"nested too deeply; lists and objects of {limits.MOST_NESTED} levels are read"
    )


def _is_deep(value: object) -> bool:
    """Whether lists and objects are nested more than `limits.MOST_NESTED` deep."""
    level = [value] if isinstance(value, list | dict) else []
    for _ in range(limits.MOST_NESTED):
        inner = (v.values() if isinstance(v, dict) else v for v in level)
        level = [v for part in inner for v in part if isinstance(v, list | dict)]
    return bool(level)


def csv_rows(path: pathlib.Path, text: str) -> list[tuple[str, dict[str, str]]]:
    """Reads the rows of a CSV file, `(place, row)`; a cell that a short row lacks is "".

    Raises:
      SourceError: a name of a column occurs twice, columns are not separated by commas, a row has
        too many cells, or a quote is open.
    """
    before = csv.field_size_limit(limits.MOST_CHARACTERS)  # The module's own is 131,072.
    number = 1
    rows: list[tuple[str, dict[str, str]]] = []
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), restval="", strict=True)
        names = reader.fieldnames or []
        if len(names) > limits.MOST_COLUMNS:
            raise SourceError(
                f"{path} row 1: {len(names):,} columns; at most {limits.MOST_COLUMNS:,} are read."
            )
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
            if len(rows) * len(names) > limits.MOST_VALUES:
                raise SourceError(
                    f"{path}: more than {limits.MOST_VALUES:,} cells; split it into several."
                )
            rows.append((f"{path} row {number}", row))
    except csv.Error as error:
        words = one_line(error)
        if "field limit" in words:
            words = f"a cell has more than {limits.MOST_CHARACTERS:,} characters; split its text"
        raise SourceError(f"{path} row {number + 1}: not CSV ({words}).") from None
    finally:
        csv.field_size_limit(before)
    return rows
