"""Dialogues read on from the cache are answered as dialogues read anew."""

import numpy as np
import pytest
from families import VOCAB, checkpoint

from fedsafe_jax.federated.mesh import make_mesh
from fedsafe_jax.inference import chat_session, generation, language_model
from fedsafe_jax.inference.chat_session import ChatSession
from fedsafe_jax.inference.sampling import GREEDY
from fedsafe_jax.models import hub

FIRST = ("Hello!", "What is the capital of France?", "Write a short poem about the ocean.", "Hi")
THEN = ("Say that again in other words, please.", "Why?", "And now the same, but shorter.", "Oh?")


@pytest.fixture
def read(monkeypatch):
    """The shapes of what is read: in prefills, and behind a cache."""
    seen = {"prefill": [], "extend": []}
    for name in seen:
        whole = getattr(generation.Engine, name)

        def spy(self, first, *others, name=name, whole=whole):
            seen[name].append(np.shape(first if name == "extend" else first.tokens))
            return whole(self, first, *others)

        monkeypatch.setattr(generation.Engine, name, spy)
    return seen


def turns(lm, talk, batch_size, edit=lambda text: text, **options):
    """Two more turns by `talk`, and what the model says to the same dialogues at once."""
    dialogues = [[("user", text)] for text in FIRST]
    for call, following in enumerate([*[THEN] * 2, None]):
        found = talk.answer_dialogues(dialogues, 24, seed=call, **options)
        expected = lm.answer_dialogues(dialogues, 24, seed=call, batch_size=batch_size, **options)
        assert found[0] == expected[0]
        np.testing.assert_array_equal(found[1], expected[1])
        for dialogue, text, ask in zip(dialogues, found[0], following or FIRST, strict=True):
            dialogue += [("assistant", edit(text)), ("user", ask)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_later_turns_are_read_alone(packaged, read, temperature):
    turns(packaged, ChatSession(packaged, 3), 3, temperature=temperature)
    # Of three turns in two batches each: the first by the conversation, all by the model.
    assert (len(read["prefill"]), len(read["extend"])) == (8, 4)


def test_a_changed_answer_is_read_again(packaged, read):
    turns(packaged, ChatSession(packaged, 4), 4, edit=lambda text: text[: len(text) // 2] + "...")
    assert len(read["extend"]) == 2


def test_nothing_is_kept_beyond_the_limit(packaged, read, monkeypatch):
    monkeypatch.setattr(chat_session, "KEPT_BYTES", 0)
    turns(packaged, ChatSession(packaged, 4), 4)
    assert not read["extend"]


def test_devices_share_the_rows():
    split = language_model.load_pretrained("package:model", mesh=make_mesh())
    turns(split, ChatSession(split, 8), 8)


def test_a_dialogue_cut_to_the_context_is_read_anew(packaged):
    talk = ChatSession(packaged)
    dialogue = [("user", "word " * 480)]
    for _ in range(3):
        (found,), _ = talk.answer_dialogues([dialogue], 24, truncate=True)
        (expected,), _ = packaged.answer_dialogues([dialogue], 24, truncate=True)
        assert found == expected
        dialogue += [("assistant", found), ("user", "word " * 300)]


@pytest.mark.parametrize("family", ["gemma3", "qwen3"])
def test_tokens_and_windows(tmp_path, family, read):
    """Under random weights: on ids, where one token more or less shows."""
    pytest.importorskip("torch")
    checkpoint(family, tmp_path)
    config = hub.read_config(tmp_path)
    params = hub.load_params(tmp_path, config, "float32")

    class Ids:
        """A tokenizer of numbers."""

        eos_token_id = 2

        def decode(self, ids, skip_special_tokens):
            return " ".join(map(str, ids))

    lm = language_model.LanguageModel(config, params, Ids(), hf_config={})
    lm.render = lambda dialogues, max_new_tokens, cut: dialogues
    rng = np.random.default_rng(0)
    rows = [rng.integers(3, VOCAB, n).tolist() for n in (3, 30, 17, 9)]
    talk = ChatSession(lm, 4)
    for _ in range(3):
        texts, _ = talk.answer_dialogues(rows, 12)
        (expected,) = generation.generate_ids(
            lm.model,
            params,
            None,
            prompts=rows,
            stop_ids=(2,),
            max_new_tokens=12,
            seed=0,
            sampling=GREEDY,
            batch_size=4,
        )
        assert texts == [lm.text(ids) for ids in expected.ids]
        more = rng.integers(3, VOCAB, (4, 5)).tolist()
        rows = [r + ids + new for r, ids, new in zip(rows, expected.ids, more, strict=True)]
    assert bool(read["extend"]) == (not config.windowed_layers)
