"""The README's Python runs as it stands there, and what it links to is there."""

import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_load_generate_train_export_and_load_elsewhere(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    pytest.importorskip("peft")
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    tokens = np.array([names["lm"].tokenizer("Who are you?")["input_ids"]])
    ours = names["lm"].with_adapter(names["adapter"])(tokens)
    for theirs in (names["merged"], names["adapted"]):
        with torch.no_grad():
            logits = theirs.eval()(torch.tensor(tokens)).logits.numpy()
        np.testing.assert_allclose(ours, logits, atol=1e-3)  # logits of size 10, merged once


def test_links_lead_somewhere():
    pages = [README, *README.parent.glob("docs/*.md"), README.parent / "CONTRIBUTING.md"]
    links = 0
    for page in pages:
        for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"
                links += 1
    assert links > 8


def test_the_documentation_builds_without_a_warning(tmp_path):
    pytest.importorskip("sphinx")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "docs", str(tmp_path)]
    done = subprocess.run(command, cwd=README.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "generated/configuration.html").read_text()
    for field in ("cai.schedule", "filter.hard_negatives", "clients_per_round"):
        assert f">{field}<" in page
    for html in tmp_path.glob("*.html"):  # nothing is loaded from elsewhere
        assert not re.search(r'(?:src|href)="https?://[^"]*\.(?:js|css|woff2?)', html.read_text())
