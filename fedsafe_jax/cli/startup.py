"""What the command lines of the package share."""

import importlib.resources
import os
import pathlib

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


def border_errors():
    """Errors whose message is all that a user needs to see."""
    from fedsafe_jax.cai.constitution import ConstitutionError
    from fedsafe_jax.data.partition import PartitionError
    from fedsafe_jax.data.sources import SourceError
    from fedsafe_jax.evals.judges import EndpointError
    from fedsafe_jax.filters.protocol import FilterError
    from fedsafe_jax.models.hub import ModelError
    from fedsafe_jax.runtime.multihost import ClusterError
    from fedsafe_jax.runtime.run_files import WorkdirError

    data = ConstitutionError, PartitionError, SourceError, WorkdirError
    return *data, ClusterError, EndpointError, FilterError, ModelError


def check_flags(argv: list[str], defaults) -> None:
    """Finds a mistyped `--config.field` before absl does, to name the field that was meant."""
    from fedsafe_jax.config import check_override

    for argument in argv[1:]:
        name, _, _ = argument.lstrip("-").partition("=")
        if argument.startswith("--") and name.startswith("config."):
            check_override(name.removeprefix("config.").split("[")[0], defaults)


def find_configs(argv: list[str]) -> list[str]:
    """`argv` with `--config=configs/NAME.py` of the package where no such file is at hand: an
    installed package has no repository beside it."""
    found = []
    for argument in argv:
        flag, _, value = argument.partition("=")
        path, colon, rest = value.partition(":")
        if flag == "--config" and path.startswith("configs/") and not pathlib.Path(path).exists():
            packaged = importlib.resources.files("fedsafe_jax") / path
            if packaged.is_file():
                argument = f"{flag}={packaged}{colon}{rest}"
        found.append(argument)
    return found
