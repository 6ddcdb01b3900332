"""Writes answers that are there already for inspect_ai or lm-evaluation-harness.

    fedsafe export-answers --workdir=DIR [--arm=ARM,...] [--seed=N] --export_dir=FOLDER
    fedsafe export-answers --input=FILE [--task=NAME] [--model=NAME] --export_dir=FOLDER

The first form writes those that a run kept, a file for each task, arm and seed; the second those of
any file that `fedsafe judge` reads or writes, with the verdicts it holds. --export=lm_eval writes
`samples_*.jsonl` in the place of inspect_ai's logs. Nothing is judged or computed.
"""

import pathlib

from absl import flags
from etils import epath
from ml_collections import ConfigDict

from fedsafe_jax.cli import export_flags
from fedsafe_jax.cli.command import Command, UsageError
from fedsafe_jax.cli.export import run_config
from fedsafe_jax.cli.judge import read_answers
from fedsafe_jax.interop.origin import Origin

SETTINGS = ("max_new_tokens", "temperature", "system", "prefix")
# What every row of a run says of its set, and so is said once.
KEY = ("task", "version", "prompts", "adapter")


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags."""
    here = {"flag_values": values}
    flags.DEFINE_string("workdir", None, "Folder of a run, local or gs://BUCKET/FOLDER.", **here)
    flags.DEFINE_list("arm", None, "Arms of the run, such as fl,fl+cai; all without.", **here)
    flags.DEFINE_integer("seed", None, "Seed of the run; all without.", **here)
    flags.DEFINE_string("input", None, "File of answers, in the place of a run.", **here)
    flags.DEFINE_string("task", None, "Name of the task of --input; else the file's.", **here)
    flags.DEFINE_string("model", "unknown", "Name of the model that answered --input.", **here)
    export_flags.define(values, ["inspect"])


def main(values: flags.FlagValues) -> None:
    """Writes a file for each task, and prints their paths."""
    if bool(values.workdir) == bool(values.input):
        raise UsageError("--workdir, --input: give one of them.")
    for flag in ("task", "model") if values.workdir else ("arm", "seed"):
        if values[flag].present:
            other = "--input" if values.workdir else "--workdir"
            raise UsageError(f"--{flag}: belongs to {other}.")
    export_flags.check(values)
    if values.workdir:
        _export_run(values)
        return
    path = pathlib.Path(values.input)
    facts, rows = _without_key(read_answers(path))
    task = values.task or str(facts.get("task", path.stem))
    version = facts.get("version")
    version = version if isinstance(version, int) else 0
    origin = Origin(task, values.model, version=version, source=path.name, facts=facts)
    export_flags.write(values, rows, origin)


def _export_run(values: flags.FlagValues) -> None:
    from fedsafe_jax.pipeline.arms import planned_arms
    from fedsafe_jax.pipeline.evaluation import chosen_sets
    from fedsafe_jax.pipeline.workdir import ArmFiles
    from fedsafe_jax.runtime import run_files

    workdir = epath.Path(values.workdir)
    config = run_config(workdir)
    arms = {one.id: one for one in planned_arms(config)}
    for name in values.arm or ():
        if name not in arms:
            raise UsageError(f"--arm={name}: not there; arms of the run: {', '.join(arms)}.")
    if values.seed is not None and values.seed not in config.seeds:
        seeds = ", ".join(map(str, config.seeds))
        raise UsageError(f"--seed={values.seed}: not there; seeds of the run: {seeds}.")
    sets, written = chosen_sets(config), 0
    for arm in values.arm or arms:
        for seed in config.seeds if values.seed is None else (values.seed,):
            folder = ArmFiles(workdir, arms[arm], seed).answers("").folder
            for task, one in sets.items():
                if kept := run_files.read_lines(folder / f"{task}.jsonl"):
                    facts, rows = _without_key(kept)
                    origin = Origin(
                        task,
                        f"{arm}:seed{seed}",
                        version=facts.get("version", one.task.version),
                        source=one.source,
                        settings=_settings(config),
                        facts={"base": config.model, "arm": arm, "seed": seed} | facts,
                        tags=(arm, f"seed{seed}"),
                    )
                    export_flags.write(values, rows, origin)
                    written += 1
    if not written:
        raise UsageError(f"--workdir={values.workdir}: keeps no answers of these arms and seeds.")


def _settings(config: ConfigDict) -> dict:
    return {name: config.eval[name] for name in SETTINGS}


def _without_key(rows: list[dict]) -> tuple[dict, list[dict]]:
    """Takes out of rows what they all say of their set, and returns it beside them."""
    first = rows[0]
    same = {k: first[k] for k in KEY if k in first and all(r.get(k) == first[k] for r in rows)}
    return same, [{k: v for k, v in row.items() if k not in same} for row in rows]


COMMAND = Command(define_flags, main, required=("export_dir",))
