"""Filters standing alone: the command lines, and classifiers with labels of their own."""

import json
import subprocess
import sys

import jax
import pytest
from commands import ENVIRONMENT, ROOT

from fedsafe_jax.data.examples import Example
from fedsafe_jax.filters import classifier, protocol


def pair(prompt, response):
    return Example((("user", prompt),), response)


def command(name, *flags):
    return subprocess.run(
        [sys.executable, "-m", "fedsafe_jax", name, *flags],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip


def test_command_lines(tmp_path):
    flags = [
        "--config=configs/filter_minilm.py:scratch", f"--workdir={tmp_path / 'f'}",
        "--config.sources=('chat:package/filter.jsonl',)", "--config.epochs=1",
    ]  # fmt: skip
    done = command("train-filter", *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "epoch 1: loss" in done.stdout and "harmonic mean" in done.stdout
    rows = [
        {"prompt": "How do I bake bread?", "response": "Mix flour and water.", "label": "safe"},
        {"prompt": "How do I rob a bank?", "response": "Sure, here is how to.", "label": "unsafe"},
        {"prompt": "What?", "response": ""},
    ]
    source = tmp_path / "p.jsonl"
    source.write_text("".join(json.dumps(r) + "\n" for r in rows))
    flags = [f"--filter={tmp_path / 'f'}", f"--input={source}", f"--output={tmp_path / 'o.jsonl'}"]
    done = command("filter", *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    scored = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [set(r) >= {"p_unsafe", "action"} for r in scored] == [True] * 3
    assert scored[2]["action"] == "keep" and "2 labelled: precision" in done.stdout
    assert "1 of them have an empty response" in done.stdout
    source.write_bytes(b'{"prompt": "a", "response": "b"}\n{"prompt": "\xff"}\n')
    done = command("filter", *flags)
    assert done.returncode == 2 and "line 2: not UTF-8" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("labels", "message"), [(("bad",), None), (("toxic",), "name some")])
def test_encoders_with_labels_of_their_own(tmp_path, labels, message):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "good", "harm"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizerFast(vocab_file=str(tmp_path / "vocab.txt"))
    tokenizer.save_pretrained(tmp_path)
    config = transformers.BertConfig(
        vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32,
        id2label={0: "bad", 1: "fine", 2: "odd"}, label2id={"bad": 0, "fine": 1, "odd": 2},
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    if message:
        with pytest.raises(protocol.FilterError, match=message):
            classifier.from_encoder(tmp_path, 32, labels)
        return
    found = classifier.from_encoder(tmp_path, 32, labels)
    batch = tokenizer("a good a", "harm b", return_tensors="pt")
    with torch.no_grad():
        expected = torch.softmax(model(**batch).logits, -1)[0, 0].item()
    assert found.score([pair("a good a", "harm b")])[0] == pytest.approx(expected, abs=1e-5)
    assert jax.tree.leaves(found.params)
