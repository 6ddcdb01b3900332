"""Filters: what they learn, how they decide, what clients do with the verdict."""

import json

import numpy as np
import pytest
from scipy.special import expit

from fedsafe_jax.data import sources
from fedsafe_jax.data.examples import Example
from fedsafe_jax.data.packing import round_up
from fedsafe_jax.data.refusals import REFUSAL, start_refusal
from fedsafe_jax.filters import (
    actions,
    cache,
    classifier,
    decision,
    guard,
    protocol,
    quality,
    store,
    stream,
)
from fedsafe_jax.filters.pairs import drop_mislabelled, hard_negatives
from fedsafe_jax.filters.training import TrainingOptions
from fedsafe_jax.inference import language_model
from fedsafe_jax.models import lora
from fedsafe_jax.pipeline import filtering

SHAPE = lora.LoraConfig(8, 16.0, ("q_proj", "v_proj"))


@pytest.fixture(scope="module")
def pairs():
    return sources.load("chat:package/filter.jsonl", "")


@pytest.fixture(scope="module")
def trained(packaged, pairs):
    return classifier.train(pairs[::2], packaged.tokenizer, 0, options=TrainingOptions(epochs=8))


def pair(prompt, response, label="safe", category=""):
    return Example((("user", prompt),), response, label, category=category)


def test_quality_counts_and_rates():
    found = quality.quality([1, 1, 1, 0, 0], [1, 1, 0, 1, 0])
    assert (found.true_positive, found.false_negative, found.false_positive) == (2, 1, 1)
    assert found.accuracy == 60
    assert found.precision == found.recall == pytest.approx(200 / 3)
    assert found.hmean == pytest.approx(200 / 3)


def test_auroc_counts_pairs_in_order():
    unsafe, scores = np.array([1, 0, 1, 0, 0]), np.array([0.9, 0.1, 0.4, 0.4, 0.8])
    wins = [(a > b) + 0.5 * (a == b) for a in scores[unsafe == 1] for b in scores[unsafe == 0]]
    assert quality.auroc(unsafe, scores) == pytest.approx(np.mean(wins))
    assert np.isnan(quality.auroc([1, 1], [0.1, 0.2]))


def test_reliability_of_honest_and_of_boastful_probabilities():
    rng = np.random.default_rng(0)
    p = rng.uniform(size=20000)
    unsafe = rng.random(20000) < p
    assert quality.reliability(unsafe, p).error < 0.015  # the noise of 2,000 pairs a bin
    boastful = expit(3 * np.log(p / (1 - p)))
    assert quality.reliability(unsafe, boastful).error > 0.1


def test_temperature_undoes_boasting():
    rng = np.random.default_rng(1)
    z = rng.normal(size=20000) * 2
    unsafe = rng.random(20000) < expit(z)
    found = decision.fit(3 * z, unsafe)
    assert found.temperature == pytest.approx(3, rel=0.05)
    assert found.bias == pytest.approx(0, abs=0.05)
    assert quality.reliability(unsafe, found.probability(3 * z)).error < 0.015


def test_decisions_are_made_for_the_share_that_is_expected():
    rng = np.random.default_rng(4)
    unsafe = rng.random(20000) < 0.5
    z = rng.normal(size=20000) + np.where(unsafe, 1.0, -1.0)  # log-odds are 2 z
    found = decision.fit(z, unsafe, share=0.2)
    assert found.temperature == pytest.approx(0.5, rel=0.05)
    assert found.bias == pytest.approx(np.log(0.2 / 0.8), abs=0.1)
    some = quality.resample(unsafe, 0.2, seed=0)
    assert quality.reliability(unsafe[some], found.probability(z[some])).error < 0.015

    def hmean(t):
        return quality.quality(unsafe[some], found.probability(z[some]) >= t).hmean

    best = max(hmean(t) for t in np.linspace(0.01, 0.99, 99))
    assert hmean(found.threshold) == pytest.approx(best, abs=1)
    separable = decision.fit([-3.0, -2.0, 2.0, 3.0], [False, False, True, True])
    assert np.isfinite(separable).all() and separable.temperature > 0.05


def test_thresholds_are_the_best_of_all():
    rng = np.random.default_rng(2)
    unsafe = rng.random(300) < 0.3
    p = np.clip(0.35 * unsafe + rng.uniform(0, 0.65, 300), 0, 1)

    def at(t):
        q = quality.quality(unsafe, p >= t)
        return q.hmean, q.precision / 100, q.recall / 100

    every = [at(t) for t in np.linspace(0, 1, 2001)]
    chosen = decision.choose_threshold(p, unsafe)
    assert at(chosen)[0] == pytest.approx(max(f for f, _, _ in every), abs=0.01)
    chosen = decision.choose_threshold(p, unsafe, "recall", 0.8)
    assert at(chosen)[1] >= 0.8
    assert at(chosen)[2] == pytest.approx(max(r for _, q, r in every if q >= 0.8), abs=0.01)


def test_resampling_gives_the_share():
    unsafe = np.arange(1000) < 700
    chosen = quality.resample(unsafe, 0.3, seed=0)
    assert len(chosen) == 429 and unsafe[chosen].mean() == pytest.approx(0.3, abs=0.01)


def test_streams_cover_every_pair_with_little_padding():
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 128, 500)
    seen, padded = [], 0
    shapes = set()
    for chosen, width, rows in stream.batches(lengths, 2048):
        assert lengths[chosen].max() <= width and len(chosen) <= rows
        assert rows * width <= 2048
        seen += chosen.tolist()
        padded += rows * width
        shapes.add((rows, width))
    assert len(shapes) <= 9  # what is compiled: a shape for each width, and the last
    assert sorted(seen) == list(range(500))
    assert lengths.sum() / padded > 0.85
    assert [round_up(n) for n in (1, 16, 17, 128, 129, 300)] == [16, 16, 32, 128, 160, 320]


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


def test_filters_come_back_from_disk(tmp_path, packaged, pairs, trained):
    store.save(trained[0], tmp_path / "c")
    found = store.load(tmp_path / "c")
    assert found.decision == trained[0].decision
    np.testing.assert_array_equal(found.log_odds(pairs[:20]), trained[0].log_odds(pairs[:20]))
    options = TrainingOptions(epochs=1, batch_size=16, learning_rate=1e-3)
    made, _ = guard.train(pairs[::10], packaged, SHAPE, seed=0, options=options, max_length=96)
    store.save(made, tmp_path / "g", SHAPE, "package:model")
    found = store.load(tmp_path / "g", language_model.load_pretrained)
    np.testing.assert_allclose(found.score(pairs[:20]), made.score(pairs[:20]), atol=1e-6)
    with pytest.raises(protocol.FilterError, match="no filter.json"):
        store.load(tmp_path)
    about = json.loads((tmp_path / "c" / "filter.json").read_text())
    (tmp_path / "c" / "filter.json").write_text(json.dumps({"kind": about["kind"]}))
    with pytest.raises(protocol.FilterError, match="damaged"):
        store.load(tmp_path / "c")


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


def test_guard_reads_the_verdict_and_learns_it(packaged, pairs):
    options = TrainingOptions(epochs=0, batch_size=16)
    untrained, _ = guard.train(pairs[::10], packaged, SHAPE, seed=0, options=options, max_length=96)
    # Without training the adapter is zero: the log-odds are the base model's own.
    (row,) = guard.render_pairs(packaged.tokenizer, pairs[64:65], 96, untrained.template)
    safe, unsafe = guard.verdict_ids(packaged.tokenizer)
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
        guard.render_pairs(packaged.tokenizer, pairs[:2], 16, "short")


def test_templates(packaged):
    assert guard.template_of(packaged.tokenizer, 128) == "short"
    assert guard.template_of(packaged.tokenizer, 4096) == "policy"
    ids = guard.render_pairs(packaged.tokenizer, [pair("Ask", "Say")], 4096, "policy")[0]
    text = packaged.tokenizer.decode(ids)
    assert "S14: Code Interpreter Abuse." in text and "User: Ask" in text and "Agent: Say" in text


EXAMPLES = [
    pair("a", "fine", "safe", "x"),
    pair("b", "harm", "unsafe", "x"),
    pair("c", "also fine", "safe", "y"),
]
P = np.array([0.1, 0.9, 0.6], np.float32)


def test_actions():
    found = actions.apply("drop", EXAMPLES, P, 0.5)
    assert [e.prompt for e in found.examples] == ["a"] and found.counts.dropped == 2
    assert found.counts.unsafe_flagged == 1 and found.by_category == {"x": (1, 2), "y": (1, 1)}
    found = actions.apply("replace", EXAMPLES, P, 0.5)
    assert [e.response for e in found.examples] == ["fine", REFUSAL, REFUSAL]
    assert found.counts.rewritten == 2 and found.counts.kept == 1
    asked = []
    found = actions.apply(
        "rewrite", EXAMPLES, P, 0.5, lambda some: asked.extend(some) or ["better", " "]
    )
    assert [e.prompt for e in asked] == ["b", "c"]
    assert [e.response for e in found.examples] == ["fine", "better"]
    assert (found.counts.rewritten, found.counts.dropped) == (1, 1)
    found = actions.apply("mask", EXAMPLES, P, 0.5)
    np.testing.assert_array_equal(found.weights, [1, 0, 0])
    found = actions.apply("weight", EXAMPLES, P, 0.5)
    np.testing.assert_allclose(found.weights, [0.9, 0.1, 0.4], rtol=1e-6)
    empty = actions.apply("drop", EXAMPLES[1:2], P[1:2], 0.5)
    assert empty.examples == [] and empty.counts.dropped == 1  # a client that was all unsafe


def test_simulated_filters_have_their_rates():
    some = [pair(str(i), "r", "unsafe" if i % 10 < 3 else "safe") for i in range(20_000)]
    unsafe = np.array([e.label == "unsafe" for e in some])
    found = actions.simulated(some, 0.737, 0.567, [0])
    q = quality.quality(unsafe, found >= 0.5)
    assert q.recall == pytest.approx(73.7, abs=2) and q.precision == pytest.approx(56.7, abs=2)
    # What the paper's filter leaves: 13% of the kept pairs are harmful.
    assert unsafe[found < 0.5].mean() == pytest.approx(0.129, abs=0.01)
    more = actions.simulated(some, 0.9, 0.9, [0])
    assert np.all(more[unsafe] >= found[unsafe])


def test_scores_are_kept_by_content(tmp_path):
    calls = []

    class Fake:
        decision = decision.Decision(2.0, 0.4)

        def log_odds(self, some):
            calls.append(len(some))
            return np.arange(len(some), dtype=np.float32)

    kept = cache.ScoreCache(tmp_path, "f")
    first = kept.log_odds([*EXAMPLES, EXAMPLES[0]], Fake)
    np.testing.assert_array_equal(first, [0, 1, 2, 0])  # equal pairs are scored once
    again = cache.ScoreCache(tmp_path, "f")
    np.testing.assert_array_equal(again.log_odds(EXAMPLES[::-1], Fake), [2, 1, 0])
    assert calls == [3] and again.decision == [2.0, 0.4, 0.0]
    again.log_odds([pair("new", "one")], Fake)
    assert calls == [3, 1]


def test_a_filter_that_was_trained_again_is_another(tmp_path):
    (tmp_path / "filter.json").write_text("{}")
    (tmp_path / "classifier.safetensors").write_bytes(b"one")
    before = cache.folder_hash(tmp_path)
    assert cache.folder_hash(tmp_path) == before
    (tmp_path / "classifier.safetensors").write_bytes(b"two")
    assert cache.folder_hash(tmp_path) != before


def test_training_that_diverges_is_one_error(packaged, pairs):
    options = TrainingOptions(epochs=1, learning_rate=float("nan"))
    with pytest.raises(protocol.FilterError, match="never finite; lower filter.learning_rate"):
        classifier.train(pairs[::8], packaged.tokenizer, 0, options=options)


def test_every_harmful_question_also_stands_with_a_refusal():
    some = [pair(f"q{i}", "Sure.", "unsafe") for i in range(10)]
    some += [pair("x", "I'm sorry, but no."), pair("y", "Cake.")]
    twins = hard_negatives(some, 0.5, 0)
    assert len(twins) == 5 and len({t.prompt for t in twins}) == 5
    assert all(t.label == "safe" and t.response == "I'm sorry, but no." for t in twins)
    assert hard_negatives(some, 0.5, 0) == twins
    assert hard_negatives(some, 0.0, 0) == []
    assert hard_negatives(some[:10], 1.0, 0)[0].response == REFUSAL


def test_an_unsafe_refusal_is_a_contradiction():
    refusal = "I'm sorry, but I can't."
    some = [pair("a", refusal, "unsafe"), pair("b", "Sure.", "unsafe"), pair("c", refusal)]
    assert drop_mislabelled(some) == (some[1:], 1)
