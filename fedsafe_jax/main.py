"""Command line of a run.

python -m fedsafe_jax.main --config=configs/demo.py --workdir=DIR [--config.FIELD=VALUE]
"""

import os
import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file.", lock_config=True)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run: everything it writes goes there."
)


def quiet_libraries(workdir: str) -> None:
    """Environment that must be set before jax and transformers are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    cache = str(pathlib.Path(workdir) / "compilation_cache")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


def check_flags(argv: list[str]) -> None:
    """Finds a mistyped `--config.field` before absl does, to name the field that was meant."""
    from fedsafe_jax.config import check_override, default_config

    for argument in argv[1:]:
        name, _, _ = argument.lstrip("-").partition("=")
        if argument.startswith("--") and name.startswith("config."):
            check_override(name.removeprefix("config.").split("[")[0], default_config())


def main(argv):
    del argv
    if _CONFIG.value is None:
        raise SystemExit("--config: give a config file, such as --config=configs/demo.py")
    config = _CONFIG.value
    if not _WORKDIR.value and not config.dry_run:
        raise SystemExit("--workdir: give a folder for the run, such as --workdir=/tmp/demo")
    quiet_libraries(_WORKDIR.value or "/tmp")
    logging.set_verbosity(logging.WARNING)  # libraries; the run's own lines go through progress
    from fedsafe_jax.config import ConfigError, validate

    try:
        if config.dry_run:
            from fedsafe_jax import plan

            validate(config)
            print(plan.describe(config))
            return
        validate(config)
        from fedsafe_jax import experiment

        experiment.run(config, _WORKDIR.value)
        print(f"report: {pathlib.Path(_WORKDIR.value) / 'report.html'}")
    except (ConfigError, *_border_errors()) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("\ninterrupted; the same command continues from the last round.") from None


def _border_errors():
    from fedsafe_jax.cai.constitution import ConstitutionError
    from fedsafe_jax.data.partition import PartitionError
    from fedsafe_jax.data.sources import SourceError
    from fedsafe_jax.evals.judges import EndpointError
    from fedsafe_jax.filters.classifier import FilterError
    from fedsafe_jax.models.hub import ModelError
    from fedsafe_jax.records import WorkdirError

    data = ConstitutionError, PartitionError, SourceError, WorkdirError
    return *data, EndpointError, FilterError, ModelError


if __name__ == "__main__":
    from fedsafe_jax.config import ConfigError as _ConfigError

    try:
        check_flags(sys.argv)
    except _ConfigError as error:
        raise SystemExit(f"error: {error}") from None
    app.run(main)
