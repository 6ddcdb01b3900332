"""Fields of a config with default and meaning, read from the source that sets the defaults."""

import ast
import inspect
import io
import re
import textwrap
import tokenize
from collections.abc import Callable
from typing import NamedTuple

import ml_collections

from fedsafe_jax.config import default_config, filter_config
from fedsafe_jax.validation import choices


class Field(NamedTuple):
    """A field of a config; `name` has dots, and `meaning` is "" where the name says enough."""

    name: str
    default: str
    meaning: str

    @property
    def group(self) -> str:
        """Part of the name before the last dot: "cai" of "cai.steps", "" of "rounds"."""
        return self.name.rpartition(".")[0]


def fields_of(builder: Callable[..., ml_collections.ConfigDict]) -> list[Field]:
    """Reads the lines `c.name = default  # meaning` of a function that builds a config.

    Comments on lines of their own above an assignment belong to its meaning. A field that is
    assigned again further down (for an argument after the colon) keeps its first default.
    """
    source = textwrap.dedent(inspect.getsource(builder))
    code, comments = source.splitlines(), {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            code[row - 1] = code[row - 1][:column]
            comments[row] = token.string.removeprefix("#").strip()
    fields: dict[str, Field] = {}
    for node in sorted(ast.walk(ast.parse(source)), key=lambda x: getattr(x, "lineno", 0)):
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Attribute):
            continue
        name = ast.unparse(node.targets[0]).partition(".")[2]
        default = _one_line(ast.get_source_segment("\n".join(code), node.value) or "")
        if name in fields or default.startswith("ml_collections"):
            continue
        row, meaning = node.lineno - 1, []
        while row in comments and not code[row - 1].strip():
            meaning.insert(0, comments[row])
            row -= 1
        meaning += filter(None, [comments.get(node.end_lineno)])
        fields[name] = Field(name, default, " ".join(meaning))
    return list(fields.values())


def _one_line(code: str) -> str:
    """A value without the line breaks and the last comma that the formatter puts into long ones."""
    return re.sub(r"\s+", " ", re.sub(r",\s+\)", ")", re.sub(r"\(\s+", "(", code)))


def run_fields() -> list[Field]:
    """Returns the fields of a run, in the order of `config.default_config`.

    Names that a field may have are those of the registries that `validation` reads.
    """
    return [_with_choices(field) for field in fields_of(default_config)]


def _with_choices(field: Field) -> Field:
    allowed = choices().get(field.name)
    if allowed is None:
        return field
    some = "some" if field.default.startswith("(") else "one"
    names = ", ".join(name or '""' for name in allowed)
    return field._replace(meaning=f"{field.meaning}; {some} of {names}")


def filter_fields() -> list[Field]:
    """Returns the fields of `fedsafe train-filter`: a run's `filter`, and its own."""
    shared = [f for f in run_fields() if f.group == "filter"]
    return [f._replace(name=f.name.removeprefix("filter.")) for f in shared] + fields_of(
        filter_config
    )


def markdown() -> str:
    """Returns the documentation's page of a run's fields, a table for each group."""
    page = [
        "# Configuration",
        "",
        "A config is a Python file with `get_config()` that starts from `default_config()`; every "
        "field can be set on the command line, `--config.cai.steps=20`. A mistyped field is an "
        "error that names the nearest one. `fedsafe run --help` prints this page, "
        "`fedsafe run --help=cai` one group.",
    ]
    group = None
    for field in sorted(run_fields(), key=lambda f: bool(f.group)):
        if field.group != group:
            group = field.group
            title = f"`{group}`" if group else "The run"
            page += ["", f"## {title}", "", "| field | default | |", "|---|---|---|"]
        name, default, meaning = (text.replace("|", "\\|") for text in field)
        page.append(f"| `{name}` | `{default}` | {meaning} |")
    return "\n".join([*page, ""])
