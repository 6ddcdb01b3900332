"""Compiles what a run would compile, for devices that need not be there, and measures it.

    fedsafe compile --config=configs/paper.py --target=h100 [--json=FILE] [--strict]

For each program of the run: bytes a device, whether it fits, operations a useful token beside the
least that is possible, attention kernels, and what devices tell each other. Shapes alone are
needed: no weights, and of the data lengths alone. A program that does not fit is a result.
"""

import json
import pathlib

from absl import flags

from fedsafe_jax.aot import targets
from fedsafe_jax.cli.command import Command, Config, UsageError, check_file, hint
from fedsafe_jax.cli.config_help import run_fields
from fedsafe_jax.config import default_config
from fedsafe_jax.runtime import native_notes
from fedsafe_jax.validation import validate

PROGRAMS = (
    "train",
    "sum",
    "server",
    "filter_train",
    "filter_score",
    "prefill",
    "decode",
    "cai",
)


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags."""
    flags.DEFINE_string(
        "target", None, f"Devices to compile for: {targets.KNOWN}.", flag_values=values
    )
    flags.DEFINE_string("json", None, "File of the figures.", flag_values=values)
    flags.DEFINE_string(
        "lengths",
        None,
        "File of the examples' lengths, a line each: tokens of the prompt and of the response. "
        "Without it, lengths are distributed as those of the Dolly data set.",
        flag_values=values,
    )
    flags.DEFINE_list(
        "programs", list(PROGRAMS), "Programs to compile, of those of a run.", flag_values=values
    )
    flags.DEFINE_bool(
        "strict", False, "Exit code 1 where a program does not fit.", flag_values=values
    )


def main(values: flags.FlagValues) -> None:
    """Compiles the programs, prints a table and writes the figures.

    Raises:
      SystemExit: with code 1, with `--strict`, where a program does not fit.
    """
    target = targets.parse(values.target)
    for name in values.programs:
        if name not in PROGRAMS:
            raise UsageError(f"--programs={name}: no such program; {hint(name, PROGRAMS)}")
    validate(values.config)
    if values.json:
        check_file("json", values.json)
    targets.prepare(target)
    from fedsafe_jax.aot import compilation, lengths, table
    from fedsafe_jax.aot.filter_programs import filters
    from fedsafe_jax.aot.program import Run, of_host
    from fedsafe_jax.aot.programs import constitutional, federated, generation

    examples = lengths.read(values.lengths) if values.lengths else lengths.default()

    def slice_of(count: int):
        part = targets.part(target, count)
        return part and targets.devices(part)

    copies = values.config.model_parallel
    with native_notes.without_notes():
        devices = targets.devices(target)
        copy, host = slice_of(copies), slice_of(len(of_host(devices, copies)))
    run = Run(values.config, devices, examples, copy=copy, host=host)
    makers = {
        federated: ("train", "sum", "server"),
        filters: ("filter_train", "filter_score"),
        generation: ("prefill", "decode"),
        constitutional: ("cai",),
    }
    results = []
    for make, names in makers.items():
        if not set(names) & set(values.programs):
            continue
        for program in make(run):
            if program.name in values.programs:
                table.note(f"{target.name}: {program.name}")
                results.append(compilation.compile_program(program, target))
                if values.json:  # one after another, as a large program may take minutes
                    content = {"programs": [result._asdict() for result in results]}
                    text = json.dumps(content, indent=1) + "\n"
                    pathlib.Path(values.json).write_text(text, encoding="utf-8")
    table.show(results, target)
    if values.strict and not all(result.fits for result in results):
        raise SystemExit(1)


COMMAND = Command(
    define_flags,
    main,
    required=("target",),
    config=Config(default_config, run_fields, "configs/paper.py"),
)
