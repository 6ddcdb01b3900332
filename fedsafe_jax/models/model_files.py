"""Files of a Hugging Face folder: JSON, and safetensors that are read lazily."""

import json
import os
import pathlib

import numpy as np
from safetensors import SafetensorError, safe_open

from fedsafe_jax import whole_files
from fedsafe_jax.models.decoder_config import ModelError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Types of tensors in files, as safetensors names them.
FLOATS = ("F64", "F32", "F16", "BF16")


MOST_BYTES = 2**28  # of a JSON file; the largest in use, a vocabulary, have 40 MB
PIECE = 2**20  # numbers that are looked at at once


def check_finite(numbers: np.ndarray, where: str) -> None:
    """Checks that a tensor has no NaN and no infinity, with which a model answers nonsense.

    One core looks at 1 to 4 GB a second, about as fast as a disk is read.

    Args:
      numbers: floats of any shape.
      where: file and tensor, for the message.

    Raises:
      ModelError: it has.
    """
    flat = numbers.reshape(-1)
    for start in range(0, flat.size, PIECE):
        if not np.isfinite(flat[start : start + PIECE]).all():
            raise ModelError(
                f"{where} has numbers that are not finite in {flat.dtype.name}: the file is "
                "damaged, or its training diverged; download it again, or use another."
            )


def read_json(path: pathlib.Path) -> dict:
    """Reads an object from a JSON file of a model folder.

    Raises:
      ModelError: no such file, too large, or not JSON.
    """
    if not os.path.isfile(path):
        raise ModelError(f"{path}: no such file; a Hugging Face model folder holds a {path.name}.")
    if (size := path.stat().st_size) > MOST_BYTES:
        raise ModelError(f"{path}: has {size:,} bytes; at most {MOST_BYTES:,} are read.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        words = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise ModelError(f"{path}: not JSON ({words}).") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: holds a {type(content).__name__}; expected an object {{...}}.")
    return content


def write_json(path: pathlib.Path, content: dict) -> None:
    """Writes indented JSON with a final newline."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    with whole_files.replaced(path) as new:
        new.write_text(text, encoding="utf-8")


class Tensors:
    """Safetensors of a folder, single or sharded by an index, read lazily.

    Args:
      folder: a Hugging Face folder.

    Raises:
      ModelError: no safetensors, a missing or damaged file, or a tensor that is not in the file
        that the index names.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = pathlib.Path(folder)
        if os.path.isfile(self.folder / INDEX):
            self._file_of = _weight_map(self.folder / INDEX)
        elif os.path.isfile(self.folder / SINGLE):
            self._file_of = dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        else:
            pickled = sorted(p.name for p in self.folder.glob("*.bin"))
            hint = ""
            if ggml := sorted(p.name for p in self.folder.glob("*.gguf")):
                hint = f" It has {ggml[0]}: name that file as the model, not its folder."
            elif pickled:
                hint = (
                    f" It has {pickled[0]}: pickled weights are not loaded, as they may run code. "
                    "Convert them where you trust them: load the model in transformers and "
                    "save_pretrained it."
                )
            raise ModelError(f"{self.folder}: no {SINGLE} and no {INDEX}.{hint}")
        self._files = {name: self._open(name) for name in sorted(set(self._file_of.values()))}
        for name, file in self._file_of.items():
            if name not in self._keys(file):
                raise ModelError(f"{self.folder / INDEX}: '{name}' is not in {file}.")

    def _open(self, name: str):
        path = self.folder / name
        if not os.path.isfile(path):  # pathlib raises where a name is too long for any file
            raise ModelError(f"{path}: no such file, though {INDEX} names it; download it again.")
        try:
            return safe_open(path, framework="numpy")
        except SafetensorError as error:
            raise ModelError(f"{path}: damaged or cut off ({error}); download it again.") from error

    def _keys(self, file: str) -> set[str]:
        return set(self._files[file].keys())

    def names(self) -> set[str]:
        """Returns the names of all tensors."""
        return set(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape."""
        return tuple(self._view(name).get_shape())

    def check_dtype(self, name: str) -> None:
        """Checks that a tensor's type is one of `FLOATS`, which its file's header tells.

        Raises:
          ModelError: another type, such as the codes of a quantised checkpoint.
        """
        if (dtype := self._view(name).get_dtype()) not in FLOATS:
            codes = f"the weights are quantised by a method that stores {dtype}; "
            raise ModelError(
                f"{self.folder / self._file_of[name]}: tensor '{name}' has type {dtype}, which is "
                f"not supported: {codes if dtype.startswith(('F', 'I', 'U')) else ''}"
                f"use the unquantised model (expected {', '.join(FLOATS)})."
            )

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a part of a tensor; only the bytes of that part are read from disk."""
        return self._view(name)[index]

    def _view(self, name: str):
        return self._files[self._file_of[name]].get_slice(name)


def _weight_map(path: pathlib.Path) -> dict[str, str]:
    """Reads which file each tensor is in, from an index of files."""
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ModelError(f"{path}: weight_map={files!r:.60}; expected the file of each tensor.")
    for name, file in files.items():
        # Files of other folders are none of the model's.
        if not isinstance(file, str) or pathlib.PurePath(file).name != file:
            raise ModelError(
                f"{path}: '{name[:60]}' is in {file!r:.60}; expected a file of the folder."
            )
    return files
