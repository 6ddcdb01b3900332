"""Notes that compiled libraries write to stderr by themselves, about devices that are not here.

The extra `aot` brings compilers for GPUs and TPUs to machines that have neither. Their libraries
say so at length, past every setting of Python or absl, as soon as jax imports them.
"""

import contextlib
import importlib.util
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Iterator

CUDA_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
GPU_FILES = ("nvidia0", "nvidiactl", "dxg")  # in /dev: of a driver, in a container, of WSL
NOTES = re.compile(
    rb"cudart_stub\.cc|All log messages before absl::InitializeLog"
    rb"|Logging before InitGoogle|Failed to find host bounds|unexpected worker hostname"
    rb"|=== Source Location Trace|libtpu_init_utils\.cc"
)


def has_cuda_plugin() -> bool:
    """Returns whether jax's plugin for CUDA is installed."""
    return any(map(importlib.util.find_spec, CUDA_PLUGINS))


def has_gpu_files(dev: pathlib.Path = pathlib.Path("/dev")) -> bool:
    """Returns whether this machine has an NVIDIA GPU, by its device files in the folder `dev`."""
    return any((dev / name).exists() for name in GPU_FILES)


@contextlib.contextmanager
def without_notes() -> Iterator[None]:
    """Drops `NOTES` from what is written to stderr inside; the rest comes at the end."""
    try:
        sys.stderr.flush()
        kept = os.dup(2)
    except (AttributeError, OSError, ValueError):  # no stderr, or a closed one
        yield
        return
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            os.write(2, b"".join(line for line in file if not NOTES.search(line)))


def import_jax() -> None:
    """Imports jax, without notes where the plugin for CUDA is installed and no GPU is here."""
    is_noisy = "jax" not in sys.modules and has_cuda_plugin() and not has_gpu_files()
    with without_notes() if is_noisy else contextlib.nullcontext():
        importlib.import_module("jax")
