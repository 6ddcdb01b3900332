"""The encoder classifier: what it learns, and what it reads of a pair."""

import numpy as np
import pytest
from filter_examples import packaged_pairs, pair

from fedsafe_jax.filters import classifier, protocol, quality
from fedsafe_jax.filters.training import TrainingOptions


@pytest.fixture(scope="module")
def pairs():
    return packaged_pairs()


@pytest.fixture(scope="module")
def trained(packaged, pairs):
    return classifier.train(pairs[::2], packaged.tokenizer, 0, options=TrainingOptions(epochs=8))


def test_classifier_learns_and_stops_early(pairs, trained):
    found, history = trained
    held = pairs[1::2]
    unsafe = [e.label == "unsafe" for e in held]
    flagged = found.score(held) >= found.decision.threshold
    # Contentless compliance is easy to tell; well below what it reaches, far above chance.
    assert quality.quality(unsafe, flagged).accuracy > 85
    losses = [e.loss for e in history.epochs]
    assert history.best == int(np.argmin(losses)) and len(losses) <= 8


def test_scores_do_not_depend_on_the_batch(pairs, trained):
    found = trained[0]
    together = found.log_odds(pairs[:40])
    alone = np.concatenate([found.log_odds([p]) for p in pairs[:40:13]])
    # Padded to other widths and in other batches, so sums in another order.
    np.testing.assert_allclose(together[::13], alone, atol=1e-4)


def test_one_label_is_refused(packaged, pairs):
    safe = [e for e in pairs if e.label == "safe"]
    with pytest.raises(protocol.FilterError, match="both safe and unsafe pairs, found .* all safe"):
        classifier.train(safe, packaged.tokenizer, seed=0)


@pytest.mark.parametrize("response", ["", "word " * 20_000, "\u0000\ud7ff"])
def test_odd_responses_are_scored(packaged, trained, response):
    assert np.isfinite(trained[0].score([pair("What?", response)])).all()


def test_pairs_keep_the_answers_beginning_and_the_requests_end(packaged):
    words = packaged.tokenizer
    (row,) = classifier.encode_pairs(words, [pair("one two " * 50 + "last", "first " * 50)], 32)
    text = words.decode(row.ids)
    assert len(row.ids) == 32 and row.response_start == 16
    assert "last" in text and text.count("first") > 5
    (row,) = classifier.encode_pairs(words, [pair("one two " * 50, "Yes.")], 32)
    assert row.response_start > 24  # a short answer leaves its room to the request


def test_training_that_diverges_is_one_error(packaged, pairs):
    options = TrainingOptions(epochs=1, learning_rate=float("nan"))
    with pytest.raises(protocol.FilterError, match="never finite; lower filter.learning_rate"):
        classifier.train(pairs[::8], packaged.tokenizer, 0, options=options)
