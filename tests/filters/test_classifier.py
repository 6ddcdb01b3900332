"""The encoder classifier: what it learns, and what it reads of a pair."""

import numpy as np
import pytest
from filter_examples import packaged_pairs, pair

from fedsafe_jax.data.examples import Example
from fedsafe_jax.filters import classifier, protocol, quality
from fedsafe_jax.filters.training import TrainingOptions


@pytest.fixture(scope="module")
def pairs():
    return packaged_pairs()


@pytest.fixture(scope="module")
def trained(packaged, pairs):
    # Of seeds 0 to 3 seed 0 alone stops before it has learned: so few pairs start by luck.
    return classifier.train(pairs[::2], packaged.tokenizer, 1, options=TrainingOptions(epochs=8))


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


LAST = ("user", "How long does it take?")
KNOT = (("user", "I tie a knot."), ("assistant", "A bowline?"), LAST)
BREAD = (("user", "I bake bread."), ("assistant", "A sourdough?"), LAST)


def test_dialogues_that_share_the_last_turn_are_told_apart(packaged, trained):
    system = ("system", "Answer in one word.")
    texts = [
        packaged.tokenizer.decode(row.ids)
        for row in classifier.encode_pairs(
            packaged.tokenizer,
            [Example(turns, "An hour.") for turns in (KNOT, BREAD, (system, LAST))],
            128,
        )
    ]
    assert "user: I tie a knot.\n\nassistant: A bowline?\n\nuser: How long" in texts[0]
    assert "bread" in texts[1] and "bread" not in texts[0]
    assert "system: Answer in one word.\n\nuser: How long" in texts[2]
    scores = trained[0].log_odds([Example(turns, "An hour.") for turns in (KNOT, BREAD)])
    assert scores[0] != scores[1]
    risk = protocol.answer_risk(trained[0])([KNOT, BREAD], ["An hour."] * 2)
    np.testing.assert_array_equal(risk, trained[0].decision.probability(scores))


def test_long_dialogues_lose_their_oldest_turns_and_are_counted(packaged, caplog):
    system, old = ("system", "Answer in one word."), ("user", "old " * 200)
    turns = (system, old, ("assistant", "A sourdough?"), LAST)
    (row,) = classifier.encode_pairs(packaged.tokenizer, [Example(turns, "An hour.")], 64)
    text = packaged.tokenizer.decode(row.ids)
    assert len(row.ids) == 64
    assert text.startswith("system: Answer in one word.") and text.endswith("it take?An hour.")
    assert "sourdough" in text and text.count("old ") < 40
    assert "1 of 1 pairs are longer than filter.max_length=64" in caplog.text
    caplog.clear()
    classifier.encode_pairs(packaged.tokenizer, [Example(KNOT, "An hour.")], 128)
    assert not caplog.text


def test_no_dialogue_is_on_both_sides_of_a_split():
    pairs = [
        Example((("user", f"I tie knot {i // 2}."), ("assistant", "Good."), LAST), "An hour.")
        for i in range(40)
    ]
    learned, held = protocol.split(pairs, seed=0, share=0.25)
    assert len(held) == 10  # by the last turn alone all would be on one side
    assert not {pairs[i].messages for i in learned} & {pairs[i].messages for i in held}


def test_training_that_diverges_is_one_error(packaged, pairs):
    options = TrainingOptions(epochs=1, learning_rate=float("nan"))
    with pytest.raises(protocol.FilterError, match="never finite; lower filter.learning_rate"):
        classifier.train(pairs[::8], packaged.tokenizer, 0, options=options)
    # Without validation nothing has looked at it, and its filter would flag no pair.
    options = options._replace(validation_share=0.0)
    with pytest.raises(protocol.FilterError, match="diverged: its weights are not finite; lower"):
        classifier.train(pairs[::8], packaged.tokenizer, 0, options=options)
