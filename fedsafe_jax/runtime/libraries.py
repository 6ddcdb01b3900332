"""Settings of the libraries that a command uses: quiet, with a persistent compilation cache."""

import importlib.metadata
import os

from etils import epath


def quiet_libraries() -> None:
    """Silences third-party libraries, unless an environment variable asks for their messages."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")  # XLA's notes on plugins without a device


def prepare_libraries(workdir: str) -> None:
    """Silences libraries and keeps compiled programs in the workdir, for arms and resumed runs.

    JAX_COMPILATION_CACHE_DIR takes precedence. The cache is set through `jax.config`: jax reads
    its environment variables on import, and the package has imported jax by now.

    Args:
      workdir: folder of the run.
    """
    quiet_libraries()
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        cache = str(epath.Path(workdir).resolve() / "compilation_cache")
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def versions() -> dict[str, str]:
    """Returns the versions of the packages that decide a run's numbers."""
    names = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
    return {name: importlib.metadata.version(name) for name in names}
