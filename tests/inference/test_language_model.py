"""The language model as users hold it: its examples, finished answers, long dialogues."""

import dataclasses

import numpy as np
import pytest

from fedsafe_jax.data import chat
from fedsafe_jax.inference import generation
from fedsafe_jax.models import hub


def test_a_model_is_never_changed(packaged):
    with pytest.raises(dataclasses.FrozenInstanceError):
        packaged.adapter = None


def test_finished_tells_a_stop_from_a_cut(packaged):
    _, finished = packaged.answer_dialogues([(("user", "Hello!"),)], max_new_tokens=48)
    _, cut = packaged.answer_dialogues([(("user", "Hello!"),)], max_new_tokens=1)
    np.testing.assert_array_equal(finished, [True])
    np.testing.assert_array_equal(cut, [False])


def test_long_prompts_are_refused_unless_they_may_be_truncated(packaged, caplog):
    prompts = ["Hello!", "first " + "word " * 2000 + "last"]
    with pytest.raises(hub.ModelError, match=r"prompt 1 has \d+ tokens.*room for 1016"):
        packaged.generate(prompts, max_new_tokens=8)
    answers = packaged.generate(prompts, max_new_tokens=8, truncate=True)
    (warning,) = caplog.records
    assert warning.getMessage() == f"1 of 2 dialogues: {chat.CUT}"

    # The model read the whole short prompt; the long one with its header, beginning and end.
    short, long = packaged.render([[("user", text)] for text in prompts], 8, truncate=False)
    (kept,) = packaged.render([[("user", prompts[1])]], 8, truncate=True)
    assert 1000 < len(kept) <= 1016 and kept[:4] == long[:4] and kept[-8:] == long[-8:]
    assert "first word" in packaged.text(kept) and "word last" in packaged.text(kept)
    (expected,) = generation.generate_ids(
        packaged.model,
        packaged.params,
        None,
        prompts=[short, kept],
        stop_ids=packaged.stop_ids,
        max_new_tokens=8,
    )
    assert answers == [packaged.text(ids) for ids in expected.ids]
