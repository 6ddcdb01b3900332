"""A command of the command line, and the table of all."""

import difflib
import importlib
import pathlib
import tempfile
from collections.abc import Callable, Iterable
from typing import NamedTuple

import ml_collections
from absl import flags

from fedsafe_jax.cli.config_help import Field


class UsageError(ValueError):
    """The command line is wrong; the message names the flag."""


class Config(NamedTuple):
    """The config that a command reads: its fields, and a file to name in messages."""

    defaults: Callable[[], ml_collections.ConfigDict]
    fields: Callable[[], list[Field]]
    example: str


class Command(NamedTuple):
    """One command: `define_flags` on a fresh registry, then `main` with the parsed values.

    The flags are no globals of absl's registry, so that commands can define the same names and one
    process can run several.
    """

    define_flags: Callable[[flags.FlagValues], None]
    main: Callable[[flags.FlagValues], None]
    required: tuple[str, ...] = ()
    config: Config | None = None
    positional: str = ""  # flag, a list, that arguments without a flag are added to


class Entry(NamedTuple):
    """A command of the table: the module of this folder that defines `COMMAND`, and a summary."""

    module: str
    summary: str


COMMANDS = {
    "run": Entry("run", "runs a config: rounds, filter, Constitutional AI, evaluation, report"),
    "evaluate": Entry("evaluate", "evaluates a model, with or without an adapter"),
    "attack": Entry("attack", "attacks a model to measure its defence: rates of attack success"),
    "judge": Entry("judge", "judges answers that are there already, of a run or made elsewhere"),
    "train-judge": Entry("train_judge", "trains a judge of answers on human labels"),
    "train-filter": Entry("train_filter", "trains a safety filter, measures it on unseen pairs"),
    "train-critic": Entry("train_critic", "trains a critic of unfinished answers, for a search"),
    "filter": Entry("filter_pairs", "scores a file of pairs with a trained filter"),
    "revise": Entry("revise", "makes answers, critiques and revisions with any model"),
    "export": Entry("export", "writes the adapter or merged model of any arm, round or client"),
    "export-answers": Entry("export_answers", "writes kept answers for inspect_ai or lm_eval"),
    "verify": Entry("verify", "checks a run's folder against its ledger, a chain of hashes"),
    "serve": Entry("serve", "serves a model and adapters to clients of the OpenAI API"),
    "convert": Entry("convert", "writes a GGUF file as a model folder, or a folder as GGUF"),
    "fetch-data": Entry("fetch_data", "downloads public data sets, with their hashes and licences"),
    "compile": Entry("compile", "compiles a run for devices that need not be there: memory, FLOPs"),
    "pretrain": Entry("pretrain", "trains the packaged small model from scratch"),
}


def load(name: str) -> Command:
    """Imports the command's module and returns its `COMMAND`."""
    return importlib.import_module(f"fedsafe_jax.cli.{COMMANDS[name].module}").COMMAND


def hint(name: str, known: Iterable[str]) -> str:
    """Returns "did you mean ...?" with the known name nearest to a mistyped one, or all names."""
    names = list(known)
    near = difflib.get_close_matches(name, names, 1)
    return f"did you mean '{near[0]}'?" if near else f"expected one of {', '.join(names)}."


def check_folder(flag: str, folder: str, mode: int = 0o777) -> None:
    """Makes a folder for output before any compute; a bucket answers at the first write instead.

    Args:
      flag: name of the flag.
      folder: what it says.
      mode: mode of a new folder, of which the umask takes away.

    Raises:
      UsageError: it cannot be made or written to.
    """
    if "://" not in folder:
        _check_written(f"--{flag}={folder}", pathlib.Path(folder), mode)


def check_file(flag: str, file: str) -> None:
    """Makes the folder of an output file before any compute.

    Raises:
      UsageError: the folder cannot be made or written to, or the file is a folder.
    """
    if pathlib.Path(file).is_dir():
        raise UsageError(f"--{flag}={file}: is a folder; name a file.")
    _check_written(f"--{flag}={file}", pathlib.Path(file).parent)


def _check_written(given: str, folder: pathlib.Path, mode: int = 0o777) -> None:
    try:
        folder.mkdir(mode, parents=True, exist_ok=True)
        # A mode alone says little: root passes all of them, a read-only disk none.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"{given}: cannot be written ({error.strerror}).") from None
