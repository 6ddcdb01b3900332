"""Examples in docstrings run as they stand there, and every name of `fedsafe_jax` has one."""

import doctest
import importlib
import pathlib

import pytest

import fedsafe_jax as fs

ROOT = pathlib.Path(fs.__file__).parent
MODULES = [
    ".".join(("fedsafe_jax", *path.relative_to(ROOT).with_suffix("").parts))
    for path in sorted(ROOT.rglob("*.py"))
    if ">>>" in path.read_text()
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    outcome = doctest.testmod(importlib.import_module(name))
    assert outcome.attempted and not outcome.failed


@pytest.mark.parametrize("name", fs.__all__)
def test_names_that_users_import_have_an_example(name):
    assert ">>>" in getattr(fs, name).__doc__
