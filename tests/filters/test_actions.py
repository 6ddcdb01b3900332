"""What clients do with flagged pairs."""

import numpy as np
from filter_examples import pair

from fedsafe_jax.config import default_config
from fedsafe_jax.data.refusals import REFUSAL
from fedsafe_jax.filters import actions
from fedsafe_jax.validation import validate

EXAMPLES = [
    pair("a", "fine", "safe", "x"),
    pair("b", "harm", "unsafe", "x"),
    pair("c", "also fine", "safe", "y"),
]


P = np.array([0.1, 0.9, 0.6], np.float32)
NEW = [actions.NewAnswer("better"), actions.NewAnswer(" ", "refusal")]


def test_actions():
    found = actions.apply("drop", EXAMPLES, P, 0.5)
    assert [e.prompt for e in found.examples] == ["a"] and found.counts.dropped == 2
    assert found.counts.unsafe_flagged == 1 and found.by_category == {"x": (1, 2), "y": (1, 1)}
    found = actions.apply("replace", EXAMPLES, P, 0.5)
    assert [e.response for e in found.examples] == ["fine", REFUSAL, REFUSAL]
    assert found.counts.rewritten == 2 and found.counts.kept == 1
    asked = []
    found = actions.apply("rewrite", EXAMPLES, P, 0.5, lambda some: asked.extend(some) or NEW)
    assert [e.prompt for e in asked] == ["b", "c"]
    assert [e.response for e in found.examples] == ["fine", "better"]
    assert (found.counts.rewritten, found.counts.dropped) == (1, 1)
    assert found.rejected == {"refusal": 1}
    found = actions.apply("turn", EXAMPLES, P, 0.5)
    turned = [(e.response, e.turned) for e in found.examples]
    assert turned == [("fine", ""), (REFUSAL, "harm"), (REFUSAL, "also fine")]
    assert found.counts.rewritten == 2 and found.weights.tolist() == [1, 1, 1]
    (said_nothing,) = actions.apply("turn", [pair("d", " ", "unsafe")], P[1:2], 0.5).examples
    assert (said_nothing.response, said_nothing.turned) == (REFUSAL, "")
    found = actions.apply("mask", EXAMPLES, P, 0.5)
    np.testing.assert_array_equal(found.weights, [1, 0, 0])
    found = actions.apply("weight", EXAMPLES, P, 0.5)
    np.testing.assert_allclose(found.weights, [0.9, 0.1, 0.4], rtol=1e-6)
    empty = actions.apply("drop", EXAMPLES[1:2], P[1:2], 0.5)
    assert empty.examples == [] and empty.counts.dropped == 1  # a client that was all unsafe


def test_an_action_is_one_entry_of_the_registry(monkeypatch):
    def shorten(example, p_unsafe, answer=""):
        return actions.Treated(example._replace(response=example.response[:2]), 0.5, "masked")

    monkeypatch.setitem(actions.ACTIONS, "shorten", actions.Action(shorten))
    config = default_config()
    config.filter.action = "shorten"
    validate(config)
    found = actions.apply("shorten", EXAMPLES, P, 0.5)
    assert [e.response for e in found.examples] == ["fine", "ha", "al"]
    np.testing.assert_array_equal(found.weights, [1, 0.5, 0.5])
    assert found.counts.masked == 2 and found.counts.kept == 1
