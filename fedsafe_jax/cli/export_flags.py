"""Flags of commands that write answers for other harnesses: the forms, and where."""

from collections.abc import Sequence

from absl import flags

import fedsafe_jax
from fedsafe_jax.cli.command import UsageError, check_folder
from fedsafe_jax.interop import exports
from fedsafe_jax.interop.origin import Origin
from fedsafe_jax.registry import unknown


def define(values: flags.FlagValues, default: Sequence[str] = ()) -> None:
    """Defines the flags.

    Args:
      values: the command's flags.
      default: the forms without `--export`.
    """
    here = {"flag_values": values}
    flags.DEFINE_list(
        "export",
        list(default),
        f"Forms that answers are written in for other harnesses: {', '.join(exports.EXPORTS)}.",
        **here,
    )
    flags.DEFINE_string("export_dir", None, "Folder of these files, a file a task.", **here)


def check(values: flags.FlagValues) -> None:
    """Checks the flags before any compute.

    Raises:
      UsageError: an unknown form, a form without a folder or the reverse, or a folder that cannot
        be written to.
    """
    for form in values.export:
        if form not in exports.EXPORTS:
            raise UsageError(unknown("--export", form, exports.EXPORTS))
    if bool(values.export) != bool(values.export_dir):
        raise UsageError("--export, --export_dir: give both, such as --export=inspect.")
    if values.export_dir:
        check_folder("export_dir", values.export_dir)


def write(values: flags.FlagValues, rows: Sequence[dict], origin: Origin) -> None:
    """Writes the answers of one task, and prints the path of every file; of no rows nothing."""
    if not rows:
        return
    origin = origin._replace(packages={"fedsafe_jax": fedsafe_jax.__version__})
    for path in exports.write(values.export_dir, values.export, rows, origin=origin):
        print(f"exported: {path}")
