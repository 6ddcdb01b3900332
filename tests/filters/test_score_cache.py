"""Scores that are kept, by the content of filter and pair."""

import numpy as np
import pytest
from filter_examples import pair

from fedsafe_jax.data.examples import Example
from fedsafe_jax.filters import cache, decision

EXAMPLES = [
    pair("a", "fine", "safe", "x"),
    pair("b", "harm", "unsafe", "x"),
    pair("c", "also fine", "safe", "y"),
]


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
    assert calls == [3] and again.decision == Fake.decision
    again.log_odds([pair("new", "one")], Fake)
    assert calls == [3, 1]


def test_a_filter_that_was_trained_again_is_another(tmp_path):
    (tmp_path / "filter.json").write_text("{}")
    (tmp_path / "classifier.safetensors").write_bytes(b"one")
    before = cache.folder_hash(tmp_path)
    assert cache.folder_hash(tmp_path) == before
    (tmp_path / "classifier.safetensors").write_bytes(b"two")
    assert cache.folder_hash(tmp_path) != before


DECISION = '"decision": {"temperature": 2.0, "threshold": 0.4}'


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"decision": {"temperature": 2.0',
        "[]",
        "5",
        "[" * 100_000,
        '{"log_odds": {}, "decision": [1]}',
        '{"log_odds": {}, "decision": {"threshold": NaN}}',
        '{"log_odds": {}, "decision": {"threshold": 1.5}}',
        '{"log_odds": {}, "decision": {"temperature": 0}}',
        '{"log_odds": {}, "decision": {"other": 1}}',
        '{"log_odds": [1.0], ' + DECISION + "}",
        *(
            '{"log_odds": {"a": ' + score + "}, " + DECISION + "}"
            for score in ("NaN", "-Infinity", '"b"', "null", "true", "[1.0]", "1e39", "9" * 400)
        ),
    ],
)
def test_damaged_scores_are_kept_aside_and_computed_again(tmp_path, content):
    class Fake:
        decision = decision.Decision(2.0, 0.4)

        def log_odds(self, some):
            return np.arange(len(some), dtype=np.float32)

    path = tmp_path / f"f.v{cache.VERSION}.json"
    path.write_text(content)
    # Another process of the run may be reading the same file: it is renamed by the first alone.
    np.testing.assert_array_equal(
        cache.ScoreCache(tmp_path, "f", writes=False).log_odds(EXAMPLES, Fake), [0, 1, 2]
    )
    assert path.read_text() == content
    np.testing.assert_array_equal(
        cache.ScoreCache(tmp_path, "f").log_odds(EXAMPLES, Fake), [0, 1, 2]
    )
    assert (tmp_path / f"{path.name}.damaged").read_text() == content
    assert cache.ScoreCache(tmp_path, "f").decision == Fake.decision


def test_scores_of_another_version_are_not_read(tmp_path):
    class Fake:
        decision = decision.Decision()

        def log_odds(self, some):
            return np.zeros(len(some), np.float32)

    old = tmp_path / "f.json"
    old.write_text('{"decision": [1.0, 0.5, 0.0], "log_odds": {}}')
    kept = cache.ScoreCache(tmp_path, "f")
    assert kept.decision is None
    kept.log_odds(EXAMPLES, Fake)
    assert sorted(p.name for p in tmp_path.iterdir()) == [old.name, f"f.v{cache.VERSION}.json"]


def test_the_key_of_a_pair_covers_all_turns():
    last = ("user", "How long does it take?")
    dialogues = [
        (last,),
        (("user", "I tie a knot."), ("assistant", "Good."), last),
        (("user", "I bake bread."), ("assistant", "Good."), last),
        (("system", "Be brief."), last),
    ]
    pairs = [Example(turns, "An hour.") for turns in dialogues]
    assert len({cache.pair_hash(p) for p in pairs}) == 4
    # Scores of single requests that are kept stay known.
    assert cache.pair_hash(pairs[0]) == cache.content_hash(last[1], "An hour.")
