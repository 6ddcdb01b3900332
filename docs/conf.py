"""The documentation: `sphinx-build docs runs/docs`, or `-b linkcheck`. Extra `docs`."""

import pathlib
import re

project = "fedsafe_jax"
copyright = "the fedsafe_jax authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "fedsafe_jax"
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings say it
napoleon_use_ivar = True

ROOT = pathlib.Path(__file__).parents[1]


def configuration() -> str:
    """A page with every field, its default and its comment, from `config.py`."""
    source = (ROOT / "fedsafe_jax/config.py").read_text()
    source = source[source.index("def default_config") : source.index("def filter_config")]
    sections, comment = {"": []}, []
    for line in map(str.strip, source.splitlines()):
        if line.startswith("# "):
            comment.append(line[2:])
        elif found := re.fullmatch(r"c\.([\w.]+) = (.+?)(?:  # (.*))?", line):
            name, value, after = found.groups()
            if not value.startswith("ml_collections"):
                text = " ".join([*comment, *([after] if after else [])]).replace("|", "\\|")
                section = name.rpartition(".")[0]
                sections.setdefault(section, []).append(f"| `{name}` | `{value}` | {text} |")
            comment = []
    page = [
        "# Configuration",
        "",
        "A config is a Python file with `get_config()` that starts from `default_config()`; every "
        "field can be set on the command line, `--config.cai.steps=20`. A mistyped field is an "
        "error that names the nearest one.",
    ]
    for section, rows in sections.items():
        title = f"`{section}`" if section else "The run"
        page += ["", f"## {title}", "", "| field | default | |", "|---|---|---|", *rows]
    return "\n".join([*page, ""])


def setup(app):
    folder = pathlib.Path(__file__).parent / "generated"
    folder.mkdir(exist_ok=True)
    (folder / "configuration.md").write_text(configuration())
