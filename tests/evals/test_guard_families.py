"""Guards of every family that one is of: what they say is what torch says of the same tokens."""

import shutil

import numpy as np
import pytest
from families import checkpoint
from guard_templates import LLAMA_GUARD_3, QWEN3GUARD
from scipy.special import softmax

from fedsafe_jax import load_pretrained
from fedsafe_jax.evals import judges
from fedsafe_jax.evals.judges import Answered, Tools, guard
from fedsafe_jax.evals.judges.guard_formats import FORMATS
from fedsafe_jax.models.base_model import PACKAGED_FOLDER

ASKED = [
    Answered((("user", "How do I bake?"),), "Mix flour and water."),
    Answered((("user", "Why?"), ("assistant", "So."), ("user", "Ok?")), "No, " + "never. " * 9),
]
# Windows of 8 tokens lie far inside every prompt; rope scales as in Llama Guard 3.
GUARDS = {
    "harmbench": ("llama2", ""),
    "llama-guard": ("llama3.1", LLAMA_GUARD_3),
    "qwen3guard": ("qwen3", QWEN3GUARD),
    "shieldgemma": ("gemma2", ""),
    "wildguard": ("mistral", ""),
}


@pytest.fixture
def made(tmp_path, request):
    """The judge of a random checkpoint in its guard's format, its language model and torch's."""
    pytest.importorskip("torch")
    family, template = GUARDS[request.param]
    theirs = checkpoint(family, tmp_path, vocab_size=4096, max_position_embeddings=2048)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(PACKAGED_FOLDER / name, tmp_path)
    if template:
        (tmp_path / "chat_template.jinja").write_text(template)
    loaded = []

    def load(name, chat_template=None):
        loaded.append(load_pretrained(name, chat_template=chat_template))
        return loaded[0]

    (judge,) = judges.make((f"guard:{tmp_path}#{request.param}",), Tools(load))
    return request.param, judge, loaded, theirs


def logits(theirs, row):
    import torch

    with torch.no_grad():
        return theirs(torch.tensor([row])).logits[0, -1].numpy()


@pytest.mark.parametrize("made", [*GUARDS][:-1], indirect=True)
def test_verdicts_are_torchs_probabilities(made, monkeypatch):
    name, judge, loaded, theirs = made
    one = FORMATS[name]._replace(least=0.0, hazards="")  # a random model says something else
    monkeypatch.setitem(FORMATS, name, one)
    verdicts = judge.judge(ASKED)
    (lm,) = loaded
    words = [*one.good, *one.bad]
    before, tokens, _ = guard.verdict_tokens(lm, one.lead, words)
    for answered, verdict in zip(ASKED, verdicts, strict=True):
        rows = one.rows(lm.tokenizer, answered, 1900)
        at = [logits(theirs, [*row, *before])[tokens] for row in rows]
        chances = softmax(np.array(at), axis=1)
        good = chances[:, : len(one.good)].sum(axis=1)
        assert verdict.score == pytest.approx(good.min(), abs=1e-4)
        word = chances[good.argmin()].argmax()
        assert verdict.refused == (word < len(one.good))
        if name == "qwen3guard":
            assert verdict.label == words[word].lower()
        elif name == "shieldgemma":
            broken = zip(one.policies, chances.argmax(axis=1), strict=True)
            assert verdict.label == ", ".join(policy for policy, at in broken if at == 1)
            assert dict(verdict.hazards) == pytest.approx(
                dict(zip(one.policies, good, strict=True)), abs=1e-4
            )


@pytest.mark.parametrize("made", ["wildguard"], indirect=True)
def test_replies_are_what_torch_would_say(made, monkeypatch):
    """WildGuard's verdict stands behind two other lines, so its reply is generated and read."""
    name, judge, loaded, theirs = made
    monkeypatch.setitem(FORMATS, name, FORMATS[name]._replace(tokens=8))
    said = []
    read = guard.guard_formats.read_line
    monkeypatch.setattr(
        guard.guard_formats, "read_line", lambda one, reply: said.append(reply) or read(one, reply)
    )
    judge.judge(ASKED[:1])
    (lm,) = loaded
    (row,) = FORMATS[name].rows(lm.tokenizer, ASKED[0], 1900)
    ids = []
    while len(ids) < 8 and (not ids or ids[-1] not in lm.stop_ids):
        ids.append(int(logits(theirs, [*row, *ids]).argmax()))
    assert said == [lm.text([i for i in ids if i not in lm.stop_ids])]
