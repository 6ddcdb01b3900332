"""The documentation: `sphinx-build docs runs/docs`, or `-b linkcheck`. Extra `docs`."""

import pathlib

from fedsafe_jax.cli import config_help

project = "fedsafe_jax"
copyright = "the fedsafe_jax authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "fedsafe_jax"
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings say it
napoleon_use_ivar = True


def setup(app):
    folder = pathlib.Path(__file__).parent / "generated"
    folder.mkdir(exist_ok=True)
    (folder / "configuration.md").write_text(config_help.markdown())
