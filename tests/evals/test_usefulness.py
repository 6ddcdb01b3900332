"""Usefulness of generated answers: numbers, words and exercises against plain counts."""

import json

import numpy as np
import pytest

from fedsafe_jax.data.examples import SourceError
from fedsafe_jax.evals import TASKS, EvalOptions, normalised
from fedsafe_jax.evals.task import EvalSet
from fedsafe_jax.evals.tasks import gsm8k
from fedsafe_jax.pipeline import evaluation


class Says:
    """A model that says what it is told, item by item."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def answer_dialogues(self, dialogues, **options):
        assert len(dialogues) == len(self.answers)
        return self.answers, np.arange(len(dialogues)) > 0  # the first one is cut


def outcome_of(name, items, *answers):
    sets = {name: EvalSet(TASKS[name], "here", items)}
    outcome = evaluation.evaluate(Says(*answers), sets, EvalOptions())
    return outcome[name], evaluation.summarise(sets, [outcome], EvalOptions())[name]


@pytest.mark.parametrize(
    ("answer", "last", "behind"),
    [
        ("So 3 + 4 = 7.\n#### 7", "7", "7"),
        ("She pays $1,234.50. Then", "1234.50", "[invalid]"),
        ("It is 5.", "5", "[invalid]"),
        ("#### -12 and then 99", "99", "-12"),
        ("#### 1,000", "1000", "1000"),
        ("no number", "[invalid]", "[invalid]"),
        ("7 ...", "..", "[invalid]"),  # the harness' pattern takes dots for a number
    ],
)
def test_the_final_number_is_extracted_as_the_harness_does(answer, last, behind):
    assert gsm8k.comparable(gsm8k.flexible(answer)) == last
    assert gsm8k.comparable(gsm8k.strict(answer)) == behind


def test_gsm8k_counts_right_final_numbers(tmp_path):
    rows = [{"question": f"What is {i} + 1?", "answer": f"One more.\n#### {i + 1}"} for i in (3, 8)]
    rows += [{"instruction": "How many?", "input": "", "output": "6 x 2 = 12 apples, $12."}]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    items = TASKS["gsm8k"].load("p.json", str(tmp_path))
    assert [item.response for item in items] == ["4", "9", "12"]
    assert items[0].prompt == "Question: What is 3 + 1?\nAnswer:"
    assert TASKS["gsm8k"].prompts(items)[2] == "How many?"
    answers = ("#### 4\nQuestion: next? 7", "It is 9, not 8.", "12.00")
    outcome, summary = outcome_of("gsm8k", items, *answers)
    assert outcome["flexible"] == [1, 0, 0] and outcome["strict"] == [1, 0, 0]
    assert summary["accuracy"] == pytest.approx(100 / 3) and summary["unfinished"] == 1
    (tmp_path / "q.json").write_text(json.dumps([{"question": "?", "answer": "none"}]))
    with pytest.raises(SourceError, match="item 0: the answer holds no number"):
        TASKS["gsm8k"].load("q.json", str(tmp_path))


def test_token_f1_is_squads():
    assert normalised.normalise(" The  U.S.'s\ncapital, an IDEA ") == "uss capital idea"
    # All three words of the answer are among the reference's four.
    assert normalised.f1("a red, red fox", "The red fox ran red!") == pytest.approx(
        2 * 1.0 * 0.75 / 1.75
    )
    assert normalised.f1("blue", "red") == 0 and normalised.f1("", "red") == 0
    assert normalised.exact("The Fox.", "fox") and not normalised.exact("foxes", "fox")


def test_exercises_have_one_right_answer_each():
    items = TASKS["exercises"].load(TASKS["exercises"].source, "")
    assert len(items) > 100 and len({item.prompt for item in items}) == len(items)
    answers = [item.response for item in items]
    answers[0] = "<think>Easy.</think>" + answers[0].upper()
    answers[1] = "No idea."
    outcome, summary = outcome_of("exercises", items, *answers)
    assert outcome["exact"] == [1, 0] + [1] * (len(items) - 2)
    assert summary["exact"] == pytest.approx(100 * (1 - 1 / len(items)))
    assert summary["f1"] >= summary["exact"] and summary["n"] == len(items)
