"""Dialogues extended in the prefix cache are answered like dialogues read from the start."""

import numpy as np
import pytest
from families import VOCAB, checkpoint

from fedsafe_jax.federated.mesh import make_mesh
from fedsafe_jax.inference import chat_session, generation, language_model, pretrained
from fedsafe_jax.inference.chat_session import ChatSession
from fedsafe_jax.inference.sampling import GREEDY
from fedsafe_jax.models import hub

FIRST = ("Hello!", "What is the capital of France?", "Write a short poem about the ocean.", "Hi")
THEN = ("Say that again in other words, please.", "Why?", "And now the same, but shorter.", "Oh?")


@pytest.fixture
def read(monkeypatch):
    """Shapes of the tokens read by prefill, and of those read behind the prefix cache."""
    seen = {"prefill": [], "extend": []}
    for name in seen:
        whole = getattr(generation.Engine, name)

        def spy(self, first, *others, name=name, whole=whole):
            seen[name].append(np.shape(first if name == "extend" else first.tokens))
            return whole(self, first, *others)

        monkeypatch.setattr(generation.Engine, name, spy)
    return seen


def compare_turns(lm, session, batch_size, edit=lambda text: text, **options):
    """Asserts that three turns by the session equal the model's answers to whole dialogues."""
    dialogues = [[("user", text)] for text in FIRST]
    for call, following in enumerate([*[THEN] * 2, None]):
        texts, finished = session.answer_dialogues(dialogues, 24, seed=call, **options)
        expected = lm.answer_dialogues(dialogues, 24, seed=call, batch_size=batch_size, **options)
        assert texts == expected[0]
        np.testing.assert_array_equal(finished, expected[1])
        for dialogue, text, ask in zip(dialogues, texts, following or FIRST, strict=True):
            dialogue += [("assistant", edit(text)), ("user", ask)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_later_turns_are_read_alone(packaged, read, temperature):
    compare_turns(packaged, ChatSession(packaged, 3), 3, temperature=temperature)
    # Three turns in two batches: the session prefills the first turn alone, the model every turn.
    assert (len(read["prefill"]), len(read["extend"])) == (8, 4)


def test_a_changed_answer_is_read_again(packaged, read):
    compare_turns(
        packaged, ChatSession(packaged, 4), 4, edit=lambda text: text[: len(text) // 2] + "..."
    )
    assert len(read["extend"]) == 2


def test_nothing_is_kept_beyond_the_limit(packaged, read, monkeypatch):
    monkeypatch.setattr(chat_session, "CACHE_BYTES", 0)
    compare_turns(packaged, ChatSession(packaged, 4), 4)
    assert not read["extend"]


def test_devices_share_the_rows():
    split = pretrained.load_pretrained("package:model", mesh=make_mesh())
    compare_turns(split, ChatSession(split, 8), 8)


def test_a_dialogue_cut_to_the_context_is_read_anew(packaged):
    session = ChatSession(packaged)
    dialogue = [("user", "word " * 480)]
    for _ in range(3):
        (answer,), _ = session.answer_dialogues([dialogue], 24, truncate=True)
        (expected,), _ = packaged.answer_dialogues([dialogue], 24, truncate=True)
        assert answer == expected
        dialogue += [("assistant", answer), ("user", "word " * 300)]


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

    class IdModel(language_model.LanguageModel):
        """A model whose dialogues are token ids already."""

        def render(self, dialogues, max_new_tokens, truncate):
            del max_new_tokens, truncate
            return dialogues

    lm = IdModel(config, params, Ids(), hf_config={})
    rng = np.random.default_rng(0)
    rows = [rng.integers(3, VOCAB, n).tolist() for n in (3, 30, 17, 9)]
    session = ChatSession(lm, 4)
    for _ in range(3):
        texts, _ = session.answer_dialogues(rows, 12)
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
