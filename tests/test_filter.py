"""The filter's quality counts, and that training separates what can be separated."""

import pytest

from fedsafe_jax.data import sources
from fedsafe_jax.filters import actions, classifier


def test_quality_counts_and_rates():
    found = classifier.quality([1, 1, 1, 0, 0], [1, 1, 0, 1, 0])
    assert (found.true_positive, found.false_negative, found.false_positive) == (2, 1, 1)
    assert found.accuracy == 60
    assert found.precision == found.recall == pytest.approx(200 / 3)
    assert found.hmean == pytest.approx(200 / 3)


def test_filter_learns_and_drops(packaged):
    pairs = sources.load("chat:package/filter.jsonl", "")
    trained = classifier.train(pairs[::2], packaged.tokenizer, seed=0, epochs=3)
    kept, flagged, counts = actions.drop(trained, pairs[1::2])
    assert len(kept) == counts.kept == int((~flagged).sum())
    unsafe = [e.label == "unsafe" for e in pairs[1::2]]
    assert counts.unsafe_dropped + counts.unsafe_kept == sum(unsafe)
    # Contentless compliance is easy to tell; well below what it reaches, far above chance.
    assert classifier.quality(unsafe, flagged).accuracy > 85


def test_one_label_is_refused(packaged):
    pairs = [e for e in sources.load("chat:package/filter.jsonl", "") if e.label == "safe"]
    with pytest.raises(ValueError, match="both safe and unsafe"):
        classifier.train(pairs, packaged.tokenizer, seed=0)
