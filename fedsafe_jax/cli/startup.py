"""The start of every command: its flags and config, its help, and the one border of errors.

    fedsafe COMMAND [--flag=value ...]        or        python -m fedsafe_jax COMMAND ...

Wrong input is one line on stderr and exit code 2; a bug keeps its traceback.
"""

import contextlib
import faulthandler
import logging
import os
import re
import signal
import sys
from collections.abc import Sequence

from absl import flags
from absl import logging as absl_logging
from ml_collections import config_flags

import fedsafe_jax
from fedsafe_jax.cli import config_file, help_page
from fedsafe_jax.cli.command import COMMANDS, Command, UsageError, hint, load
from fedsafe_jax.config import ConfigError, check_override
from fedsafe_jax.runtime.libraries import quiet_libraries
from fedsafe_jax.runtime.preemption import Preempted
from fedsafe_jax.validation import input_errors, one_line, storage_errors

HELP = re.compile(r"--?(?:help|helpshort|helpfull|h)(?:=(?P<group>.*))?")


def main() -> None:
    """Runs `fedsafe`, whose first argument is the command."""
    name, *arguments = sys.argv[1:] or [""]
    if HELP.fullmatch(name):
        print(help_page.overview())
    elif name == "--version":
        print_version()
    else:
        start(name, arguments)


def start(name: str, arguments: Sequence[str]) -> None:
    """Runs one command, and turns wrong input into a line on stderr.

    Args:
      name: one of `COMMANDS`.
      arguments: what follows the name on the command line.

    Raises:
      SystemExit: with code 2, after wrong input.
    """
    try:
        if name not in COMMANDS:
            given = f"'{name}' is no command" if name else "give a command"
            raise UsageError(f"{given}; {hint(name, COMMANDS)}")
        command = load(name)
        asked = next(filter(None, map(HELP.fullmatch, arguments)), None)
        if asked:
            print(help_page.page(name, command, asked["group"] or ""))
        elif "--version" in arguments:
            print_version()
        else:
            start_logging()
            command.main(parse(name, command, arguments))
    except storage_errors() as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(1) from None
    except (UsageError, flags.Error, ConfigError, *input_errors()) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except Preempted as signal_:
        print(f"\n{signal_}: the same command continues from the last round.", file=sys.stderr)
        sys.stderr.flush()
        # At once: leaving Python in order would wait for what the devices still compute.
        os._exit(128 + signal_.signum)


def print_version() -> None:
    """Prints the package's name and version."""
    print(f"fedsafe_jax {fedsafe_jax.__version__}")


def start_logging() -> None:
    """Lets libraries speak on stderr from warnings on, in one form for absl's and Python's.

    A command's results go to stdout; its own progress goes to stderr without passing through here.
    """
    quiet_libraries()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    absl_logging.set_verbosity(absl_logging.WARNING)
    with contextlib.suppress(Exception):  # stderr may be no file, and a crash is rare
        faulthandler.enable()


def parse(name: str, command: Command, arguments: Sequence[str]) -> flags.FlagValues:
    """Reads a command's arguments into a registry of flags of its own.

    Args:
      name: the command's name.
      command: its flags and config.
      arguments: in any of absl's forms: `--flag=value`, `--flag value`, `--noflag`, `--flagfile`.

    Returns:
      The flags; the config, with its overridden fields, is the flag `config`.

    Raises:
      UsageError, ConfigError, flags.Error: an argument is wrong, or one is missing.
    """
    values = flags.FlagValues()
    command.define_flags(values)
    arguments = values.read_flags_from_files(list(arguments), force_gnu=False)
    if command.config:
        text, arguments = _take_config(arguments, command.config.example)
        for argument in arguments:
            if field := re.match(r"--?(?:no)?config\.([^=\[]+)", argument):
                check_override(field[1], command.config.defaults())
        config = config_file.read(text)
        config_file.check_fields(text, config, command=name, own=command.config)
        # The config is given as an object: read by absl, an error in the file would be a traceback
        # in the middle of a message, and a field could not stand before the file.
        config_flags.DEFINE_config_dict(
            "config", config, flag_values=values, sys_argv=["", *arguments]
        )
    values.set_gnu_getopt(bool(command.positional))  # else the first name would end the flags
    rest = values(["fedsafe", *arguments])[1:]
    if rest and command.positional:
        values[command.positional].value = [*(values[command.positional].value or ()), *rest]
    elif rest:
        raise UsageError(f"unexpected argument '{rest[0]}'; flags are written --flag=value.")
    for flag in command.required:
        if values[flag].value in (None, ""):
            raise UsageError(f"--{flag}: missing; `fedsafe {name} --help` lists the flags.")
    return values


def _take_config(arguments: Sequence[str], example: str) -> tuple[str, list[str]]:
    """The last value of `--config`, and the other arguments."""
    text, rest, left = "", [], iter(arguments)
    for argument in left:
        flag, equals, value = argument.partition("=")
        if flag in ("--config", "-config"):
            text = value if equals else next(left, "")
        else:
            rest.append(argument)
    if not text:
        raise UsageError(f"--config: give a config file, such as --config={example}")
    return text, rest
