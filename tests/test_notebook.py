"""The Colab notebook, executed at a reduced size."""

import ast
import configparser
import os
import re
import shutil
import sys

import nbclient
import nbformat
import pytest
from commands import QUICK, ROOT, SMALL
from packaging.requirements import Requirement

from fedsafe_jax.runtime import devices


@pytest.fixture
def first_cell(monkeypatch):
    """What the first cell defines; nothing is installed."""
    for name in devices.TPU_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    notebook = nbformat.read(ROOT / "launch/colab_demo.ipynb", as_version=4)
    source = next(cell.source for cell in notebook.cells if cell.cell_type == "code")
    kinds = (ast.Import, ast.FunctionDef, ast.ClassDef)
    body = [node for node in ast.parse(source).body if isinstance(node, kinds)]
    names = {"PYTHON": sys.executable}
    exec(compile(ast.Module(body, []), "first cell", "exec"), names)
    return names


def claim(monkeypatch, folder, driver, capability):
    """Puts an `nvidia-smi` on PATH; it fails without a driver."""
    row = f"echo '{driver}, {capability}'" if driver else "exit 9"
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{row}\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("driver", "capability"),
    [("580.82.07", 7.5), ("580.82.07", 6.0), ("579.9", 9.0), ("550.54.15", 7.5), ("600", 12.1)],
)
def test_the_first_cell_and_the_package_choose_the_same_cuda(
    first_cell, monkeypatch, tmp_path, driver, capability
):
    claim(monkeypatch, tmp_path, driver, capability)
    expected = devices.cuda_extra(devices.Gpu("", driver, capability))
    assert first_cell["accelerator"]() == expected


def test_without_a_gpu_the_first_cell_looks_for_a_tpu(first_cell, monkeypatch, tmp_path):
    claim(monkeypatch, tmp_path, None, None)
    monkeypatch.setattr(first_cell["glob"], "glob", lambda pattern: [])
    assert first_cell["accelerator"]() == ""
    monkeypatch.setenv("TPU_WORKER_ID", "0")
    assert first_cell["accelerator"]() == "tpu"
    monkeypatch.delenv("TPU_WORKER_ID")
    monkeypatch.setattr(
        first_cell["glob"], "glob", lambda pattern: [pattern.replace("[0-9]*", "0")]
    )
    assert first_cell["accelerator"]() == "tpu"


@pytest.mark.parametrize("extra", ["", "cuda12", "cuda13", "tpu"])
@pytest.mark.parametrize(
    ("source", "url"),
    [
        ("fedsafe_jax", None),
        ("fedsafe_jax==0.1.0", None),
        ("git+https://example.org/fedsafe_jax.git@main", "same"),
        ("https://example.org/fedsafe_jax-0.1.0-py3-none-any.whl", "same"),
        ("/content/a folder/fedsafe_jax-0.1.0-py3-none-any.whl", "file"),
        ("fedsafe_jax-0.1.0-py3-none-any.whl", "file"),
    ],
)
def test_every_source_is_asked_for_with_the_extras(first_cell, source, url, extra):
    asked = Requirement(first_cell["requirement"](source, extra))
    assert asked.name == "fedsafe_jax" and asked.extras == {"report", extra} - {""}
    packaging = configparser.ConfigParser()
    packaging.read(ROOT / "setup.cfg")
    assert asked.extras <= set(packaging["options.extras_require"])
    if url is None:
        assert asked.url is None and str(asked.specifier) == source.removeprefix("fedsafe_jax")
    elif url == "same":
        assert asked.url == source
    else:
        assert asked.url.startswith("file:///") and asked.url.endswith(".whl")


def test_a_stop_is_one_line(first_cell):
    from IPython.core.interactiveshell import InteractiveShell

    def fail():
        raise first_cell["Stop"]("no GPU")

    shown = []
    shell = InteractiveShell()
    shell._showtraceback = lambda kind, error, lines: shown.extend(lines)
    shell.user_ns["fail"] = fail
    shell.run_cell("fail()")
    assert shown == ["STOP: no GPU"]


def test_a_failed_install_is_one_line_of_pip(first_cell, tmp_path):
    missing = first_cell["requirement"](str(tmp_path / "none.whl"), "")
    with pytest.raises(first_cell["Stop"], match=r"^ERROR: .*none\.whl") as stop:
        first_cell["pip"]("install", missing)
    assert "\n" not in str(stop.value)


@pytest.mark.slow
def test_every_cell_runs_and_shows_something(tmp_path, monkeypatch):
    source = ROOT / "launch/colab_demo.ipynb"
    notebook = nbformat.read(source, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)  # committed without outputs
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("XLA_FLAGS", QUICK)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    small = (*(s for s in SMALL if not s.startswith("arms")), "arms=('base','fl+filter+cai')")
    small = (*small, "rounds=1", "filter.kind=simulated")
    flags = " ".join(f'"--config.{s}"' for s in small)
    monkeypatch.setenv("FEDSAFE_FLAGS", flags)
    nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    shown = ["".join(str(o) for o in c.outputs) for c in notebook.cells if c.cell_type == "code"]
    install, demo, report, more, table, export, chat = shown
    assert re.search(r"devices: \d+ x cpu", install) and "installing" not in install
    assert "report: demo/report.html" in demo and "more/report.html" in more
    assert "<iframe srcdoc=" in report and "Constitutional AI" in report
    assert "30% of the clients" in table and "60% of the clients" in table
    # Two runs, a table of arms and one of differences each; rich shows both as HTML and as text.
    assert table.count("fl+filter+cai") == 2 * 2 * 2
    assert "demo/export/merged/model.safetensors" in export
    assert chat.count("How do I bake bread?") == 3
    assert (tmp_path / "more/config.json").is_file()
