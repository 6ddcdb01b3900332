"""Safetensors files that appear whole, and that others may read.

The library writes a private temporary file and renames it, which leaves mode 0600 whatever the
umask: on a shared disk nobody else could read a model.
"""

import contextlib
import os
import pathlib
import stat
from collections.abc import Mapping

import numpy as np
import safetensors.numpy


def save_file(
    tensors: Mapping[str, np.ndarray],
    path: str | os.PathLike[str],
    metadata: dict[str, str] | None = None,
) -> None:
    """Writes a safetensors file with the mode that the umask gives any new file.

    A writing that is cut off leaves the old file, or none.

    Args:
      tensors: contiguous arrays by name.
      path: the file, in a local folder that exists.
      metadata: texts of the file's header; transformers expects `{"format": "pt"}`.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    # A new empty file tells the umask; `os.umask` would have to change it for all threads.
    with open(temporary, "xb") as empty:
        mode = stat.S_IMODE(os.fstat(empty.fileno()).st_mode)
    try:
        safetensors.numpy.save_file(dict(tensors), temporary, metadata=metadata)
        temporary.chmod(mode)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
