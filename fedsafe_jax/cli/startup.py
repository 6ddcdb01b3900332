"""What the command lines of the package share."""

import importlib.resources
import pathlib


def check_flags(argv: list[str], defaults) -> None:
    """Finds a mistyped `--config.field` before absl does, to name the field that was meant."""
    from fedsafe_jax.config import check_override

    for argument in argv[1:]:
        name, _, _ = argument.lstrip("-").partition("=")
        if argument.startswith("--") and name.startswith("config."):
            check_override(name.removeprefix("config.").split("[")[0], defaults)


def find_configs(argv: list[str]) -> list[str]:
    """`argv` with `--config=configs/NAME.py` of the package where no such file is at hand: an
    installed package has no repository beside it."""
    found = []
    for argument in argv:
        flag, _, value = argument.partition("=")
        path, colon, rest = value.partition(":")
        if flag == "--config" and path.startswith("configs/") and not pathlib.Path(path).exists():
            packaged = importlib.resources.files("fedsafe_jax") / path
            if packaged.is_file():
                argument = f"{flag}={packaged}{colon}{rest}"
        found.append(argument)
    return found
