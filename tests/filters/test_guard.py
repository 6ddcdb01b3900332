"""Guards and guardians: what they learn, and how pairs are put to them."""

import numpy as np
import pytest
from filter_examples import packaged_pairs, pair

from fedsafe_jax.data.refusals import REFUSAL, start_refusal
from fedsafe_jax.filters import guard, guard_prompts, protocol, quality
from fedsafe_jax.filters.training import TrainingOptions
from fedsafe_jax.models import lora
from fedsafe_jax.pipeline import filtering

SHAPE = lora.LoraConfig(8, 16.0, ("q_proj", "v_proj"))


@pytest.fixture(scope="module")
def pairs():
    return packaged_pairs()


def test_guard_reads_the_verdict_and_learns_it(packaged, pairs):
    options = TrainingOptions(epochs=0, batch_size=16)
    untrained, _ = guard.train(pairs[::10], packaged, SHAPE, seed=0, options=options, max_length=96)
    # Without training the adapter is zero: the log-odds are the base model's own.
    (row,) = guard_prompts.render_pairs(packaged.tokenizer, pairs[64:65], 96, untrained.template)
    safe, unsafe = guard_prompts.verdict_ids(packaged.tokenizer)
    logits = np.asarray(packaged(np.array([row]))[0, -1], np.float64)
    assert untrained.log_odds(pairs[64:65])[0] == pytest.approx(
        logits[unsafe] - logits[safe], abs=1e-3
    )
    options = TrainingOptions(epochs=3, batch_size=16, learning_rate=3e-3)
    found, _ = guard.train(pairs[::2], packaged, SHAPE, seed=0, options=options, max_length=96)
    held = pairs[1::4]
    flagged = found.score(held) >= found.decision.threshold
    assert quality.quality([e.label == "unsafe" for e in held], flagged).accuracy > 85


def test_guardian_detects_and_answers(packaged, pairs):
    replies = guard.safe_replies(pairs, REFUSAL)
    options = TrainingOptions(epochs=5, batch_size=16, learning_rate=3e-3)
    found, _ = guard.train(
        pairs[::2], packaged, SHAPE, seed=0, options=options, max_length=64, replies=replies[::2]
    )
    held = pairs[1::4]
    flagged = found.score(held) >= found.decision.threshold
    assert quality.quality([e.label == "unsafe" for e in held], flagged).accuracy > 85
    unsafe = [e for e in held if e.label == "unsafe"][:20]
    said = filtering.guardian_replies(found, unsafe)
    refused = [start_refusal(text) for text in said]
    assert np.mean(refused) > 0.8, said


def test_guard_says_when_its_template_leaves_no_room(packaged, pairs):
    with pytest.raises(protocol.FilterError, match="filter.max_length=16.*use at least"):
        guard_prompts.render_pairs(packaged.tokenizer, pairs[:2], 16, "short")


def test_templates(packaged):
    assert guard_prompts.template_of(packaged.tokenizer, 128) == "short"
    assert guard_prompts.template_of(packaged.tokenizer, 4096) == "policy"
    ids = guard_prompts.render_pairs(packaged.tokenizer, [pair("Ask", "Say")], 4096, "policy")[0]
    text = packaged.tokenizer.decode(ids)
    assert "S14: Code Interpreter Abuse." in text and "User: Ask" in text and "Agent: Say" in text
