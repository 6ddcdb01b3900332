"""Config files: where they are, what they return, and whether a command can read it."""

import importlib.resources
import importlib.util
import inspect
import os
import pathlib
import sys
import traceback
import types

import ml_collections

from fedsafe_jax.cli.command import COMMANDS, Config, UsageError, load
from fedsafe_jax.config import ConfigError, check_override


def find(path: str) -> pathlib.Path:
    """Returns the file of a config's path; `configs/NAME.py` is found from any folder.

    A wheel holds the configs as `fedsafe_jax/configs`, a checkout beside the package.
    """
    file = pathlib.Path(path)
    if path.startswith("configs/") and not os.path.exists(file):
        package = pathlib.Path(str(importlib.resources.files("fedsafe_jax")))
        for folder in (package, package.parent):
            if os.path.isfile(folder / path):
                return folder / path
    return file


def module_of(path: str) -> types.ModuleType:
    """Runs a config file and returns its module, which has a function `get_config`.

    Raises:
      UsageError: there is no such file, it raises, or it has no `get_config`.
    """
    module = run_file("config", path)
    if not callable(getattr(module, "get_config", None)):
        raise UsageError(f"--config={path}: it defines no function get_config().")
    return module


def run_file(flag: str, path: str) -> types.ModuleType:
    """Runs a Python file of the user's and returns its module.

    The file may import what lies beside it, such as a task or an algorithm of one file.

    Args:
      flag: flag that named the file.
      path: the file.

    Raises:
      UsageError: there is no such file, or it raises.
    """
    file = find(path)
    if not os.path.isfile(file):
        raise UsageError(f"--{flag}={path}: no such file.")
    name = f"fedsafe_{flag}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UsageError(f"--{flag}={path}: expected a Python file, NAME.py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    folder = str(file.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise _blamed(flag, path, error) from None
    return module


def read(text: str) -> ml_collections.ConfigDict:
    """Returns the config of `PATH` or `PATH:ARGUMENT`, as its `get_config` builds it.

    Raises:
      UsageError: the file cannot be used, or takes no such argument.
      ConfigError: raised by the file itself.
    """
    path, colon, argument = text.partition(":")
    builder = module_of(path).get_config
    given = (argument,) if colon else ()
    try:
        inspect.signature(builder).bind(*given)
    except TypeError:
        wanted = "takes no argument" if colon else "needs an argument"
        raise UsageError(f"--config={text}: {path} {wanted} after the colon.") from None
    try:
        config = builder(*given)
    except Exception as error:
        raise _blamed("config", path, error) from None
    if not isinstance(config, ml_collections.ConfigDict):
        kind = type(config).__name__
        raise UsageError(f"--config={text}: get_config() returned {kind}, expected a ConfigDict.")
    return config


def _blamed(flag: str, path: str, error: Exception) -> ValueError:
    """The error that names the line of the user's file; a `ConfigError` is a message as it is."""
    file = find(path)
    if isinstance(error, ConfigError | UsageError):
        return error
    frames = [
        f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)
    ]
    line = error.lineno if isinstance(error, SyntaxError) else frames[-1] if frames else None
    what = error.msg if isinstance(error, SyntaxError) else error
    where = f"{path} line {line}" if line else path
    return UsageError(f"--{flag}: {where}: {type(error).__name__}: {what}")


def flat_names(config: ml_collections.ConfigDict, prefix: str = "") -> list[str]:
    """Returns the names of all fields, such as "rounds" and "cai.steps"."""
    names: list[str] = []
    for name, value in config.items():
        inner = isinstance(value, ml_collections.ConfigDict)
        names += flat_names(value, f"{prefix}{name}.") if inner else [prefix + name]
    return names


def check_fields(text: str, config: ml_collections.ConfigDict, command: str, own: Config) -> None:
    """Compares a config's fields with those the command reads.

    Raises:
      UsageError: fields are missing; the command that the config is for is named.
      ConfigError: a field is unknown.
    """
    given, defaults = flat_names(config), own.defaults()
    missing = [name for name in flat_names(defaults) if name not in given]
    if missing:
        for name in COMMANDS:
            other = load(name).config
            if name != command and other and set(flat_names(other.defaults())) <= set(given):
                raise UsageError(
                    f"--config={text} is a config of `fedsafe {name}`; `fedsafe {command}` reads "
                    f"one such as {own.example}."
                )
        raise UsageError(
            f"--config={text}: no field '{missing[0]}' ({len(missing)} of {command}'s fields are "
            f"missing); start from the defaults, as {own.example} does."
        )
    for name in given:
        try:
            check_override(name, defaults)
        except ConfigError as error:
            raise ConfigError(f"{text}: {error}") from None
