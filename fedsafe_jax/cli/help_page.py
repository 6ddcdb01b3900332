"""The pages of `--help`."""

import importlib
import shutil
import textwrap

from absl import flags

from fedsafe_jax.cli.command import COMMANDS, Command, UsageError, hint
from fedsafe_jax.cli.config_help import Field

# What a flag's value is called on the page, by absl's name for its type.
KINDS = {"int": "NUMBER", "float": "NUMBER", "comma separated list of strings": "A,B,..."}


def overview() -> str:
    """Returns the page of `fedsafe --help`: the commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {entry.summary}" for name, entry in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fedsafe COMMAND [--flag=value ...]",
            "",
            "commands:",
            *lines,
            "",
            "`fedsafe COMMAND --help` lists a command's flags and the fields of its config,",
            "`fedsafe COMMAND --help=GROUP` one group of fields; `fedsafe --version` the version.",
        ]
    )


def page(name: str, command: Command, group: str) -> str:
    """Returns the page of `fedsafe NAME --help`, or of `--help=GROUP`.

    Args:
      name: the command's name.
      command: its flags and config.
      group: group of fields that is shown alone, "" for everything.

    Raises:
      UsageError: the config has no such group.
    """
    fields = command.config.fields() if command.config else []
    if group:
        groups = list(dict.fromkeys(f.group for f in fields if f.group))
        if group not in groups:
            expected = hint(group, groups) if groups else "there are no groups of fields."
            raise UsageError(f"--help={group}: no such group; {expected}")
        return _fields_part([f for f in fields if f.group == group])
    module = importlib.import_module(command.main.__module__)
    parts = [(module.__doc__ or "").strip(), _flags_part(command)]
    if fields:
        parts.append(_fields_part(fields))
    return f"fedsafe {name}: " + "\n\n".join(parts)


def _entry(title: str, text: str) -> list[str]:
    """A title, and its text beside it where there is room, else below."""
    width = shutil.get_terminal_size((100, 24)).columns
    column = 40
    wrapped = textwrap.wrap(text, max(width - column, 30)) or [""]
    if len(title) > column - 2:
        return [title] + [" " * column + line for line in wrapped if line]
    first = f"{title:{column}}{wrapped[0]}".rstrip()
    return [first] + [" " * column + line for line in wrapped[1:]]


def _flags_part(command: Command) -> str:
    lines = ["flags:"]
    if command.config:
        example = f"Config file, such as {command.config.example} (required)."
        lines += _entry("  --config=FILE[:ARGUMENT]", example)
        lines += _entry("  --config.FIELD=VALUE", "Another value for a field of the config.")
    values = flags.FlagValues()
    command.define_flags(values)
    for name in values:
        flag = values[name]
        choices = getattr(flag.parser, "enum_values", None)
        # absl puts the choices before the help of an enum; here they are in the title.
        text = flag.help.partition(">: ")[2] if choices else flag.help
        if name in command.required:
            text += " (required)"
        elif flag.default not in (None, "", False):
            shown = ",".join(flag.default) if isinstance(flag.default, list) else flag.default
            text += f" (default: {shown})"
        value = "|".join(choices) if choices else KINDS.get(flag.parser.flag_type(), "TEXT")
        lines += _entry(f"  --[no]{name}" if flag.boolean else f"  --{name}={value}", text)
    return "\n".join(lines)


def _fields_part(fields: list[Field]) -> str:
    lines = ["fields of the config (--config.FIELD=VALUE), their defaults and meaning:"]
    group = ""
    for field in sorted(fields, key=lambda f: bool(f.group)):
        if field.group != group:
            group = field.group
            lines += ["", f" {group}:"]
        lines += _entry(f"  {field.name} = {field.default}", field.meaning)
    return "\n".join(lines)
