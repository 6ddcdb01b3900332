"""How the libraries below behave in a command: quiet, with compiled programs kept."""

import os

from etils import epath


def quiet_libraries() -> None:
    """Nothing but what the project prints on the terminal."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def prepare_libraries(workdir: str) -> None:
    """Quiet libraries, and compiled programs kept under the workdir for arms and resumed runs.

    An environment variable of the same purpose wins. The cache is set through `jax.config`: the
    package has imported jax by now, and jax reads its environment only then.
    """
    quiet_libraries()
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        cache = str(epath.Path(workdir).resolve() / "compilation_cache")
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
