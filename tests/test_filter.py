"""The filter's quality counts, and that training separates what can be separated."""

import functools

import numpy as np
import pytest

from fedsafe_jax.data import sources
from fedsafe_jax.filters import actions, classifier, guard
from fedsafe_jax.models import lora


def test_quality_counts_and_rates():
    found = classifier.quality([1, 1, 1, 0, 0], [1, 1, 0, 1, 0])
    assert (found.true_positive, found.false_negative, found.false_positive) == (2, 1, 1)
    assert found.accuracy == 60
    assert found.precision == found.recall == pytest.approx(200 / 3)
    assert found.hmean == pytest.approx(200 / 3)


def test_filter_learns_and_drops(packaged):
    pairs = sources.load("chat:package/filter.jsonl", "")
    trained = classifier.train(pairs[::2], packaged.tokenizer, seed=0, epochs=8)
    probability = functools.partial(classifier.unsafe_probability, trained)
    kept, flagged, counts = actions.drop(probability, 0.5, pairs[1::2])
    assert len(kept) == counts.kept == int((~flagged).sum())
    unsafe = [e.label == "unsafe" for e in pairs[1::2]]
    assert counts.unsafe_dropped + counts.unsafe_kept == sum(unsafe)
    # Contentless compliance is easy to tell; well below what it reaches, far above chance.
    assert classifier.quality(unsafe, flagged).accuracy > 85


def test_one_label_is_refused(packaged):
    pairs = [e for e in sources.load("chat:package/filter.jsonl", "") if e.label == "safe"]
    with pytest.raises(classifier.FilterError, match="both safe and unsafe"):
        classifier.train(pairs, packaged.tokenizer, seed=0)


def test_guard_reads_the_verdict_and_learns_it(packaged):
    pairs = sources.load("chat:package/filter.jsonl", "")
    shape = lora.LoraConfig(8, 16.0, ("q_proj", "v_proj"))
    untrained = guard.train(pairs[::10], packaged, shape, seed=0, epochs=0, max_length=96)
    # Without training the adapter is zero: the probability is the base model's own.
    tokens, lengths = guard.encode_pairs(packaged.tokenizer, pairs[64:65], 96)
    safe, unsafe = guard.verdict_ids(packaged.tokenizer)
    logits = np.asarray(packaged(tokens[:, : lengths[0]])[0, -1], np.float64)
    expected = 1 / (1 + np.exp(logits[safe] - logits[unsafe]))
    assert guard.unsafe_probability(untrained, pairs[64:65])[0] == pytest.approx(expected, abs=1e-4)

    trained = guard.train(
        pairs[::2], packaged, shape, seed=0, epochs=2, learning_rate=3e-3, max_length=96
    )
    held = pairs[1::4]
    probability = functools.partial(guard.unsafe_probability, trained)
    _, flagged, _ = actions.drop(probability, 0.5, held)
    assert classifier.quality([e.label == "unsafe" for e in held], flagged).accuracy > 85


def test_guard_says_when_its_template_leaves_no_room(packaged):
    pairs = sources.load("chat:package/filter.jsonl", "")[:2]
    with pytest.raises(classifier.FilterError, match="filter.max_length=16.*use at least"):
        guard.encode_pairs(packaged.tokenizer, pairs, 16)
