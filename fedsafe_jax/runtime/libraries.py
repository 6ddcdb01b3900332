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

from fedsafe_jax.runtime import cluster, devices, native_notes


def quiet_libraries() -> None:
    """Silences third-party libraries, unless an environment variable asks for their messages."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
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
    platforms = jax.config.jax_platforms  # on a TPU VM jax has set them by now
    has_cuda, has_libtpu = native_notes.has_cuda_plugin(), importlib.util.find_spec("libtpu")
    is_begun = xla_bridge.backends_are_initialized()
    if is_begun or platforms not in (None, "", "cpu") or not (has_cuda or has_libtpu):
        return
    plugins = {plugin.name for plugin in importlib.metadata.entry_points(group="jax_plugins")}
    is_tpu = cluster.on_tpu_vm() or bool(devices.tpu_sign(environment, dev))
    is_gpu = native_notes.has_gpu_files(dev) or bool(shutil.which("nvidia-smi"))
    if not platforms and (is_tpu or plugins - {"xla_cuda12", "xla_cuda13"}):
        return
    if not is_gpu:
        jax.config.update("jax_platforms", "cpu")
        if has_cuda:  # The plugin is read all the same: now, while its notes are dropped.
            with native_notes.without_notes():
                xla_bridge._discover_and_register_pjrt_plugins()
    elif not platforms:
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
