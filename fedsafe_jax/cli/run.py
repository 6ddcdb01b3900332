"""Runs a config: every arm's rounds, filter, Constitutional AI, evaluation, and the report.

    fedsafe run --config=configs/demo.py --workdir=DIR [--config.FIELD=VALUE ...]

The same command continues an interrupted run. `--config.dry_run` prints the plan alone.
"""

from absl import flags
from etils import epath

from fedsafe_jax import own_folder
from fedsafe_jax.cli.command import Command, Config, UsageError, check_folder
from fedsafe_jax.cli.config_help import run_fields
from fedsafe_jax.config import default_config
from fedsafe_jax.runtime.libraries import prepare_libraries
from fedsafe_jax.validation import validate


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags."""
    flags.DEFINE_string(
        "workdir",
        None,
        "Folder of the run, local or gs://BUCKET/FOLDER: everything it writes goes there.",
        flag_values=values,
    )


def main(values: flags.FlagValues) -> None:
    """Prints the plan, or runs the experiment and prints where the report is."""
    config, workdir = values.config, values.workdir
    if not workdir and not config.dry_run:
        raise UsageError("--workdir: give a folder for the run, such as --workdir=runs/demo")
    validate(config)
    from fedsafe_jax.federated.mesh import use_cores

    use_cores(config.clients_per_round)
    if config.dry_run:
        from fedsafe_jax.pipeline import dry_run

        print(dry_run.describe(config))
        return
    check_folder("workdir", workdir, mode=own_folder.PRIVATE)
    prepare_libraries(workdir)
    from fedsafe_jax import experiment
    from fedsafe_jax.runtime import multihost, preemption

    multihost.join()
    preemption.listen()
    experiment.run(config, workdir)
    if multihost.is_primary():
        print(f"report: {epath.Path(workdir) / 'report.html'}")


COMMAND = Command(define_flags, main, config=Config(default_config, run_fields, "configs/demo.py"))
