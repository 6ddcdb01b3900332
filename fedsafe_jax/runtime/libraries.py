"""Settings of the libraries that a command uses: quiet, with a persistent compilation cache."""

import importlib.metadata
import importlib.util
import os
import pathlib
import shutil
from collections.abc import Mapping

import jax
from etils import epath
from jax._src import xla_bridge

from fedsafe_jax.runtime import cluster, devices

GPU_FILES = ("nvidia0", "nvidiactl", "dxg")  # in /dev: of a driver, in a container, of WSL
CUDA_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")


def quiet_libraries() -> None:
    """Silences third-party libraries, unless an environment variable asks for their messages."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # XLA's notes on plugins without a device: level 1, which jax sets when it is imported (the
    # package has imported it by now), does not hide them.
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    leave_out_absent_devices(os.environ)


def leave_out_absent_devices(
    environment: Mapping[str, str], dev: pathlib.Path = pathlib.Path("/dev")
) -> None:
    """Keeps jax from looking for TPUs and GPUs that are not here, though their libraries are.

    The extra `aot` brings both. Without a TPU, libtpu waits for seconds, and says so at length; the
    CUDA plugin without a GPU writes a traceback. Nothing is changed where JAX_PLATFORMS is set,
    where a device shows itself, or where jax has begun.

    Args:
      environment: environment variables by name.
      dev: folder of the device files.
    """
    if jax.config.jax_platforms or xla_bridge.backends_are_initialized():
        return  # On a TPU VM jax has set the platforms by now.
    has_libtpu = importlib.util.find_spec("libtpu") is not None
    has_cuda = any(map(importlib.util.find_spec, CUDA_PLUGINS))
    is_tpu = cluster.on_tpu_vm() or bool(devices.tpu_sign(environment, dev))
    is_gpu = any((dev / name).exists() for name in GPU_FILES) or bool(shutil.which("nvidia-smi"))
    others = {plugin.name for plugin in importlib.metadata.entry_points(group="jax_plugins")} - {
        "xla_cuda12",
        "xla_cuda13",
    }
    if is_tpu or others or not (has_libtpu or has_cuda):
        return
    if not is_gpu:
        jax.config.update("jax_platforms", "cpu")
    elif has_libtpu:
        # Not by the list of platforms: what is on it must work, and a GPU whose driver is too old
        # is to leave the CPU and a warning (`devices.overlooked`).
        xla_bridge._backend_factories.pop("tpu", None)


def prepare_libraries(workdir: str) -> None:
    """Silences libraries and keeps compiled programs in the workdir, for arms and resumed runs.

    JAX_COMPILATION_CACHE_DIR takes precedence. The cache is set through `jax.config`: jax reads
    its environment variables on import, and the package has imported jax by now.

    Args:
      workdir: folder of the run.
    """
    quiet_libraries()
    if jax.config.jax_compilation_cache_dir is None:
        cache = str(epath.Path(workdir).resolve() / "compilation_cache")
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def versions() -> dict[str, str]:
    """Returns the versions of the packages that decide a run's numbers."""
    names = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
    return {name: importlib.metadata.version(name) for name in names}
