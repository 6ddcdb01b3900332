"""Command line of a run.

python -m fedsafe_jax.main --config=configs/demo.py --workdir=DIR [--config.FIELD=VALUE]
"""

import os
import sys

from absl import app, flags, logging
from etils import epath
from ml_collections import config_flags

from fedsafe_jax.cli.startup import check_flags
from fedsafe_jax.runtime.libraries import prepare_libraries
from fedsafe_jax.validation import input_errors

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file.", lock_config=True)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run: everything it writes goes there."
)


def main(argv):
    del argv
    if _CONFIG.value is None:
        raise SystemExit("--config: give a config file, such as --config=configs/demo.py")
    config = _CONFIG.value
    if not _WORKDIR.value and not config.dry_run:
        raise SystemExit("--workdir: give a folder for the run, such as --workdir=/tmp/demo")
    if _WORKDIR.value:
        prepare_libraries(_WORKDIR.value)
    logging.set_verbosity(logging.WARNING)  # libraries; the run's own lines go through progress
    from fedsafe_jax.config import ConfigError
    from fedsafe_jax.runtime.preemption import Preempted
    from fedsafe_jax.validation import validate

    try:
        if config.dry_run:
            from fedsafe_jax.pipeline import dry_run

            validate(config)
            print(dry_run.describe(config))
            return
        validate(config)
        from fedsafe_jax import experiment
        from fedsafe_jax.federated.mesh import use_cores
        from fedsafe_jax.runtime import multihost, preemption

        use_cores(config.clients_per_round)
        multihost.join()
        preemption.listen()
        experiment.run(config, _WORKDIR.value)
        if multihost.is_primary():
            print(f"report: {epath.Path(_WORKDIR.value) / 'report.html'}")
    except (ConfigError, *input_errors()) as error:
        raise SystemExit(f"error: {error}") from None
    except Preempted as signal_:
        print(f"\n{signal_}: the same command continues from the last round.", file=sys.stderr)
        sys.stderr.flush()
        # At once: leaving Python in order would wait for what the devices still compute.
        os._exit(128 + signal_.signum)


if __name__ == "__main__":
    from fedsafe_jax.cli.startup import find_configs as _find_configs
    from fedsafe_jax.config import ConfigError as _ConfigError
    from fedsafe_jax.config import default_config as _default_config

    try:
        check_flags(sys.argv, _default_config())
    except _ConfigError as error:
        raise SystemExit(f"error: {error}") from None
    app.run(main, argv=_find_configs(sys.argv))
