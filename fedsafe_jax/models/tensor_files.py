"""Safetensors files that appear whole, and that others may read.

The library leaves mode 0600 whatever the umask: on a shared disk nobody else could read a model.
"""

import os
from collections.abc import Mapping

import numpy as np
import safetensors.numpy

from fedsafe_jax import whole_files


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
    with whole_files.replaced(path) as new:
        safetensors.numpy.save_file(dict(tensors), new, metadata=metadata)
