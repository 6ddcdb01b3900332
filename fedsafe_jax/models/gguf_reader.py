"""GGUF files: their fields, and their tensors dequantised one at a time.

The header is read here rather than by `gguf.GGUFReader`, which believes every count of a file: an
array that claims 2**60 numbers would keep it busy for ever. What types are called, what a block
holds and how it is dequantised is the `gguf` package's.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import importlib.util
import math
import os
import pathlib
import re
import struct
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from fedsafe_jax.models.decoder_config import ModelError

SUFFIX = ".gguf"
# Types of tensors that are read, by the names of `gguf.GGMLQuantizationType`.
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")
VERSIONS = (2, 3)  # of the format; they differ in what this package does not read
MOST_FIELDS, MOST_TENSORS, MOST_AXES = 2**16, 2**16, 4
MOST_TEXTS = 2**22  # of an array; the longest in use, merges, have half a million
MOST_BYTES = 2**24  # of a text; the longest in use, chat templates, have 20 kB
STRING, ARRAY = 8, 9
# Numbers of fields by their code in the file.
NUMBERS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?",
    10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip


class GgufTensor(NamedTuple):
    """A tensor of a file: its type by name, its shape as numpy has it, and its bytes' place."""

    kind: str
    shape: tuple[int, ...]
    start: int
    stop: int


def is_gguf(name: str | os.PathLike[str]) -> bool:
    """Returns whether a model's name is that of a GGUF file."""
    return os.fspath(name).lower().endswith(SUFFIX)


def check_package() -> None:
    """Checks that the package `gguf` is installed.

    Raises:
      ModelError: it is not; the message says how to install it.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            "GGUF files need the package gguf, which is not installed: "
            "pip install 'fedsafe_jax[gguf]' (or pip install gguf)."
        )


class GgufFile:
    """A GGUF file whose header is read and checked, mapped into memory.

    Args:
      path: the file.

    Attributes:
      path: the file.
      fields: values of the file's fields by name; arrays are lists of texts, or numpy arrays.
      tensors: places of its tensors by name.

    Raises:
      ModelError: no such file, no GGUF, cut off, big-endian, one part of several, or a header
        that claims what is not there.
    """

    def __init__(self, path: pathlib.Path):
        check_package()
        self.path = pathlib.Path(path)
        check_start(self.path)
        try:
            self._bytes = np.memmap(self.path, mode="r")
        except (OSError, ValueError) as error:
            raise ModelError(f"{self.path}: cannot be read ({error}).") from error
        cursor = _Cursor(self._bytes, self.path)
        cursor.position = 8
        count, num_fields = cursor.numbers("<u8", 2)
        if num_fields > MOST_FIELDS or count > MOST_TENSORS:
            raise ModelError(
                f"{self.path}: claims {num_fields:,} fields and {count:,} tensors; at most "
                f"{MOST_FIELDS:,} and {MOST_TENSORS:,} are read."
            )
        self.fields: dict[str, Any] = {}
        for _ in range(int(num_fields)):
            name = cursor.text("the name of a field")
            if name in self.fields:
                raise ModelError(f"{self.path}: field '{name[:60]}' is there twice.")
            self.fields[name] = cursor.value(name)
        if self.number("split.count", 1) > 1:
            raise ModelError(_split(self.path))
        self.tensors = self._read_tensors(cursor, int(count))

    def _read_tensors(self, cursor: "_Cursor", count: int) -> dict[str, GgufTensor]:
        """Reads the places of tensors, which lie behind the header, apart from each other."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        known = {int(kind): kind for kind in GGMLQuantizationType}
        places = {}
        for _ in range(count):
            name = cursor.text("the name of a tensor")
            where = f"{self.path}: tensor '{name[:60]}'"
            if (axes := int(cursor.numbers("<u4")[0])) > MOST_AXES:
                raise ModelError(f"{where} claims {axes} axes; at most {MOST_AXES} are read.")
            # As in ggml, the axis whose numbers lie beside each other comes first.
            shape = tuple(int(size) for size in cursor.numbers("<u8", axes))[::-1]
            code, offset = int(cursor.numbers("<u4")[0]), int(cursor.numbers("<u8")[0])
            kind = known[code].name if code in known else f"of number {code}"
            if kind not in TYPES:
                raise ModelError(
                    f"{where} has type {kind}, which is not supported; expected "
                    f"{', '.join(TYPES)}: use a file of another quantisation."
                )
            block, item = GGML_QUANT_SIZES[known[code]]
            if not shape or 0 in shape or shape[-1] % block:
                raise ModelError(
                    f"{where} has shape {list(shape)}; expected rows of a multiple of {block} "
                    f"numbers ({kind})."
                )
            if name in places:
                raise ModelError(f"{self.path}: tensor '{name[:60]}' is there twice.")
            places[name] = (kind, shape, offset, math.prod(shape) // block * item)
        alignment = self.number("general.alignment", 32)
        if not 0 < alignment <= 2**20:
            raise ModelError(f"{self.path}: general.alignment={alignment}; expected 32.")
        data = -(-cursor.position // alignment) * alignment
        tensors, end, behind = {}, data, ""
        for name, (kind, shape, offset, size) in sorted(places.items(), key=lambda p: p[1][2]):
            start = data + offset
            if start < end:
                raise ModelError(
                    f"{self.path}: tensors '{behind[:60]}' and '{name[:60]}' share bytes: the file "
                    "is damaged; download it again."
                )
            if (end := start + size) > len(self._bytes):
                raise ModelError(
                    f"{self.path}: cut off: tensor '{name[:60]}' ends at byte {end:,}, the file "
                    f"has {len(self._bytes):,}; download it again."
                )
            tensors[name], behind = GgufTensor(kind, shape, start, end), name
        return tensors

    def number(self, name: str, default: float | None = None) -> Any:
        """Returns the number of a field.

        Args:
          name: the field.
          default: where there is no such field; None where it has to be there.

        Raises:
          ModelError: the field is missing, or holds something else.
        """
        value = self.fields.get(name, default)
        if value is None:
            raise ModelError(f"{self.path}: field '{name}' is missing.")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ModelError(f"{self.path}: {name}={value!r:.60}; expected a number.")
        return value

    def text(self, name: str, default: str = "") -> str:
        """Returns the text of a field, `default` without one.

        Raises:
          ModelError: the field holds something else.
        """
        if not isinstance(value := self.fields.get(name, default), str):
            raise ModelError(f"{self.path}: {name}={value!r:.60}; expected a text.")
        return value

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor without loss: float16 and bfloat16 as they are, all else as float32."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize

        tensor = self.tensors[name]
        raw = self._bytes[tensor.start : tensor.stop]
        plain = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
        if tensor.kind in plain:
            return np.frombuffer(raw, np.dtype(plain[tensor.kind])).reshape(tensor.shape)
        kind = GGMLQuantizationType[tensor.kind]
        block, item = GGML_QUANT_SIZES[kind]
        rows = np.asarray(raw).reshape(*tensor.shape[:-1], tensor.shape[-1] // block * item)
        # A scale of a damaged file may be infinite, or no number: that is said of the tensor.
        with np.errstate(all="ignore"):
            return dequantize(rows, kind)


class _Cursor:
    """A place in a file's header that never leaves the file."""

    def __init__(self, content: np.ndarray, path: pathlib.Path):
        self._content, self._path = content, path
        self.position = 0

    def take(self, size: int) -> np.ndarray:
        """Returns the next bytes, and goes behind them."""
        if size > len(self._content) - self.position:
            raise ModelError(
                f"{self._path}: cut off in its header, at byte {self.position:,} of "
                f"{len(self._content):,}; download it again."
            )
        start, self.position = self.position, self.position + size
        return self._content[start : self.position]

    def numbers(self, dtype: str, count: int = 1) -> np.ndarray:
        """Returns the next numbers of a type."""
        return np.frombuffer(self.take(np.dtype(dtype).itemsize * int(count)), dtype)

    def text(self, what: str) -> str:
        """Returns the next text: its length, then UTF-8."""
        size = struct.unpack("<Q", self.take(8))[0]
        if size > MOST_BYTES:
            raise ModelError(
                f"{self._path}: {what[:80]} claims {size:,} bytes; at most {MOST_BYTES:,} are read."
            )
        try:
            return bytes(self.take(size)).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ModelError(f"{self._path}: {what[:80]} is not UTF-8 ({error.reason}).") from error

    def value(self, name: str) -> Any:
        """Returns the value of the next field."""
        kind = int(self.numbers("<u4")[0])
        if kind == STRING:
            return self.text(name)
        if kind in NUMBERS:
            return self.numbers(NUMBERS[kind])[0].item()
        if kind != ARRAY:
            raise ModelError(f"{self._path}: field '{name[:60]}' has no type of GGUF: {kind}.")
        kind, count = int(self.numbers("<u4")[0]), int(self.numbers("<u8")[0])
        if kind in NUMBERS:
            return self.numbers(NUMBERS[kind], count)
        if kind != STRING:
            raise ModelError(f"{self._path}: field '{name[:60]}' is an array of type {kind}.")
        if count > MOST_TEXTS:
            raise ModelError(
                f"{self._path}: field '{name[:60]}' claims {count:,} texts; at most "
                f"{MOST_TEXTS:,} are read."
            )
        return [self.text(name) for _ in range(count)]


def check_start(path: pathlib.Path) -> None:
    """Checks a file's name and first bytes."""
    if not path.is_file():
        raise ModelError(f"{path}: no such file.")
    if re.search(r"-\d{5}-of-\d{5}\.gguf$", path.name, re.IGNORECASE):
        raise ModelError(_split(path))
    try:
        with path.open("rb") as file:
            start = file.read(24)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}).") from error
    if start[:4] != b"GGUF"[: max(len(start), 1)]:
        raise ModelError(f"{path}: no GGUF file: it begins with {start[:4]!r}, not b'GGUF'.")
    if len(start) < 24:
        raise ModelError(f"{path}: cut off: it has {len(start)} bytes; download it again.")
    (version,) = struct.unpack("<I", start[4:8])
    if version & 0xFFFF == 0:  # 3 in the other order of bytes
        raise ModelError(f"{path}: is big-endian, which is not supported; use the common file.")
    if version not in VERSIONS:
        raise ModelError(
            f"{path}: GGUF version {version} is not supported; expected 2 or 3: make it anew with "
            "a current llama.cpp."
        )


def _split(path: pathlib.Path) -> str:
    return (
        f"{path}: is one part of a model that is split into several files; merge them first with "
        "llama.cpp: llama-gguf-split --merge FIRST_PART OUTPUT.gguf."
    )
