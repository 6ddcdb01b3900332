"""The one place that loads a tokenizer: no code of its folder runs, and no file elsewhere is read.

`AutoTokenizer` alone would ask on the terminal whether a folder's code may run, read files that
`tokenizer_config.json` names elsewhere, and raise exceptions of many unrelated types.
"""

import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from fedsafe_jax.models.decoder_config import ModelError
from fedsafe_jax.models.model_files import read_json

CONFIG = "tokenizer_config.json"
MOST_CHARACTERS = 10_000  # of an expression; the longest in use has 1,000
# Texts on which a broken expression shows itself when a tokenizer is loaded.
PROBES = ("Hello, world! 123", "a" * 80 + "!", " " * 80 + "!", "1" * 80 + "!", "\n" * 80 + "!")


def read_tokenizer(folder: str | os.PathLike[str]) -> Any:
    """Loads the tokenizer of a local folder.

    Args:
      folder: folder with a `tokenizer.json`, or with the files of a class of transformers.

    Returns:
      A tokenizer of transformers.

    Raises:
      ModelError: there is none, it needs code of its own, names files of other folders, holds an
        expression that may never end, or cannot be read.
    """
    from transformers import AutoTokenizer

    folder = pathlib.Path(folder)
    _check_files(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
        for text in PROBES:
            tokenizer(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # Rust's panics are no Exception; others are of any type
        hint = "the folder needs a tokenizer.json"
        if "trust_remote_code" in str(error):
            hint = f"{CONFIG} asks to run code of the folder, which is never done; {hint} alone"
        words = " ".join(str(error).split())[:160] or type(error).__name__
        raise ModelError(f"{folder}: no tokenizer could be loaded; {hint} ({words}).") from error
    return tokenizer


def _check_files(folder: pathlib.Path) -> None:
    """Checks what a tokenizer's files name and hold, before a library reads them."""
    if (path := folder / CONFIG).is_file():
        for field, value in read_json(path).items():
            names = value if isinstance(value, list) else [value]
            for name in names if field.endswith(("_file", "_files")) else ():
                # A note of where a file once was, as old versions wrote it, is no harm.
                if isinstance(name, str) and _lies_elsewhere(folder, name):
                    raise ModelError(
                        f"{path}: {field} names '{name[:60]}'; expected a file of the folder."
                    )
    if (path := folder / "tokenizer.json").is_file():
        for expression in _expressions(read_json(path)):
            if len(expression) > MOST_CHARACTERS:
                raise ModelError(
                    f"{path}: an expression has {len(expression):,} characters; at most "
                    f"{MOST_CHARACTERS:,} are read."
                )
            if may_not_end(expression):
                raise ModelError(
                    f"{path}: the expression {expression[:60]!r} repeats what repeats, so it may "
                    "never end on some texts; use the tokenizer that the model was published with."
                )


def _lies_elsewhere(folder: pathlib.Path, name: str) -> bool:
    """Whether a name leads to a file that is there, outside the folder."""
    path = pathlib.Path(os.path.abspath(folder / name))
    return os.path.exists(path) and not path.is_relative_to(os.path.abspath(folder))


def _expressions(value: Any) -> Iterator[str]:
    """Yields the regular expressions of a `tokenizer.json`, without looking through its words."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name == "Regex" and isinstance(inner, str):
                yield inner
            elif name not in ("vocab", "merges", "added_tokens"):
                yield from _expressions(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _expressions(inner)


def may_not_end(expression: str) -> bool:
    """Returns whether a regular expression repeats a group that has a repetition or a choice in it.

    Only such expressions take a time that doubles with each character, as `(a+)+$` does.

    Example:
      >>> may_not_end(r"(a+)+$"), may_not_end(r"\\p{N}{1,3}| ?[^\\s(]+(?:'s|'t)?|\\s+(?!\\S)")
      (True, False)
    """
    plain = re.sub(r"\\[pP]\{[^}]*\}|\\.", "x", expression, flags=re.DOTALL)
    plain = re.sub(r"\[\^?\]?[^\]]*\]", "x", plain)
    open_groups: list[bool] = []  # whether each open group has a repetition or a choice in it
    for i, character in enumerate(plain):
        behind = plain[i + 1 : i + 2]
        if character == "(":
            open_groups.append(False)
        elif character == ")" and open_groups:
            inner = open_groups.pop()
            if inner and behind and behind in "*+{":
                return True
            if open_groups:
                open_groups[-1] |= inner
        elif character in "*+{|" and open_groups:
            open_groups[-1] = True
    return False
