"""The Colab notebook, executed at a reduced size."""

import os
import shutil

import nbclient
import nbformat
from commands import QUICK, ROOT, SMALL


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
    assert install == "" and "report: demo/report.html" in demo and "more/report.html" in more
    assert "<iframe srcdoc=" in report and "Constitutional AI" in report
    assert "30% of the clients" in table and "60% of the clients" in table
    assert table.count("fl+filter+cai") == 2 * 2  # rich shows a table as HTML and as text
    assert "demo/export/merged/model.safetensors" in export
    assert chat.count("How do I bake bread?") == 3
    assert (tmp_path / "more/config.json").is_file()
