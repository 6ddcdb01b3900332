"""The README's Python runs as it stands there."""

import pathlib
import re

import numpy as np
import pytest

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_load_generate_train_export_and_load_elsewhere(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    pytest.importorskip("peft")
    code = re.search(r"## Models\n\n```python\n(.*?)```", README.read_text(), re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    tokens = np.array([names["lm"].tokenizer("Who are you?")["input_ids"]])
    ours = names["lm"].with_adapter(names["adapter"])(tokens)
    for theirs in (names["merged"], names["adapted"]):
        with torch.no_grad():
            logits = theirs.eval()(torch.tensor(tokens)).logits.numpy()
        np.testing.assert_allclose(ours, logits, atol=1e-3)  # logits of size 10, merged once
