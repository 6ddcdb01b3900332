"""Pairs that a filter is trained on."""

from filter_examples import pair

from fedsafe_jax.data.refusals import REFUSAL
from fedsafe_jax.evals import judges
from fedsafe_jax.filters.pairs import drop_mislabelled, hard_negatives

START = judges.refuses("start")


def test_every_harmful_question_also_stands_with_a_refusal():
    some = [pair(f"q{i}", "Sure.", "unsafe") for i in range(10)]
    some += [pair("x", "I'm sorry, but no."), pair("y", "Cake.")]
    twins = hard_negatives(some, 0.5, 0, START)
    assert len(twins) == 5 and len({t.prompt for t in twins}) == 5
    assert all(t.label == "safe" and t.response == "I'm sorry, but no." for t in twins)
    assert hard_negatives(some, 0.5, 0, START) == twins
    assert hard_negatives(some, 0.0, 0, START) == []
    assert hard_negatives(some[:10], 1.0, 0, START)[0].response == REFUSAL


def test_an_unsafe_refusal_is_a_contradiction():
    refusal = "I'm sorry, but I can't."
    some = [pair("a", refusal, "unsafe"), pair("b", "Sure.", "unsafe"), pair("c", refusal)]
    assert drop_mislabelled(some, START) == (some[1:], 1)
