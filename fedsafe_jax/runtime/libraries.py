"""Settings of the libraries that a command uses: quiet, with a persistent compilation cache."""

import importlib.metadata
import importlib.util
import logging
import os
import pathlib
import shutil
import sys
from collections.abc import Mapping

import jax
from jax._src import xla_bridge

from fedsafe_jax import own_folder
from fedsafe_jax.runtime import cluster, devices, native_notes
from fedsafe_jax.whole_files import WorkdirError


def quiet_libraries() -> None:
    """Silences third-party libraries, unless an environment variable asks for their messages.

    It also leaves out what they would look for in vain: torch, and devices that are not here.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    leave_out_torch()
    leave_out_absent_devices(os.environ)


def leave_out_torch() -> None:
    """Has transformers do without torch in this process, which takes seconds to import.

    transformers imports torch with the first config where torch is installed, and no command needs
    it. What it finds on its own import holds from then on, so nothing is changed where transformers
    or torch has been imported already. Where torch is not installed transformers is not imported.
    """
    find_spec = importlib.util.find_spec
    if {"torch", "transformers"} & sys.modules.keys() or not find_spec("torch"):
        return
    importlib.util.find_spec = lambda name, package=None: (
        None if name == "torch" else find_spec(name, package)
    )
    try:
        from transformers.utils import is_torch_available

        is_torch_available()  # the answer is kept
    finally:
        importlib.util.find_spec = find_spec


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
    """Silences libraries and keeps compiled programs, for arms, resumed runs and other workdirs.

    They are kept in a folder of the user's own, `programs_folder`, and not in the workdir: compiled
    programs are code, and a workdir may come from somebody else. A workdir in a bucket keeps them
    there, for all hosts. JAX_COMPILATION_CACHE_DIR takes precedence, with a warning where others
    may write to it. The cache is set through `jax.config`: jax reads its environment variables on
    import, and the package has imported jax by now.

    Args:
      workdir: folder of the run.
    """
    quiet_libraries()
    given = jax.config.jax_compilation_cache_dir
    if given is not None:
        if (
            "://" not in given
            and os.path.isdir(given)
            and (why := own_folder.why_not_private(given))
        ):
            logging.warning(
                "JAX_COMPILATION_CACHE_DIR=%s: %s, and it holds programs that are run.", given, why
            )
        return
    if "://" in workdir:
        folder = f"{workdir.rstrip('/')}/compilation_cache"
    else:
        folder = programs_folder(os.environ)
    if folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def programs_folder(environment: Mapping[str, str]) -> str:
    """Returns the user's folder of compiled programs, created for the user alone if missing.

    Args:
      environment: environment variables by name; XDG_CACHE_HOME in place of `~/.cache`.

    Returns:
      `~/.cache/fedsafe_jax/programs`; "" with a warning where others may write to it, or where it
      cannot be created: then each start compiles anew.
    """
    try:
        return os.fspath(own_folder.cache("programs", environment))
    except WorkdirError as error:
        logging.warning(
            "Compiled programs are not kept: %s. Set JAX_COMPILATION_CACHE_DIR to a folder of your "
            "own.",
            str(error).rstrip("."),
        )
        return ""


def versions() -> dict[str, str]:
    """Returns the versions of the packages that decide a run's numbers."""
    names = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
    return {name: importlib.metadata.version(name) for name in names}
