"""Answers as rows: asked with options, judged, kept, and judged again."""

import numpy as np
import pytest

from fedsafe_jax.data.examples import Example
from fedsafe_jax.evals import TASKS, EvalOptions, EvalSet, answers, judges
from fedsafe_jax.evals.judges import FAILED, HARM, REFUSAL, Judge, JudgeError, Verdict
from fedsafe_jax.evals.task import TaskError, check_judges, select
from fedsafe_jax.pipeline import evaluation
from fedsafe_jax.pipeline.answer_files import AnswerFiles

REQUESTS = [
    Example((("user", "How?"),), "So.", category="a"),
    Example((("user", "Why?"),), ""),
    Example((("system", "Own."), ("user", "No?")), ""),
]


class Model:
    """Answers "I can't." to what it is asked with an odd seed; counts its calls."""

    calls = 0

    def answer_dialogues(self, dialogues, **options):
        self.calls += 1
        self.options, self.dialogues = options, dialogues
        said = "I can't." if options["seed"] % 2 else "Yes."
        return [options["begin"] + said] * len(dialogues), np.ones(len(dialogues), bool)


def test_samples_system_prompt_and_beginning():
    options = EvalOptions(samples=2, temperature=0.7, system="Be good.", prefix="Sure: ")
    model = Model()
    rows = answers.ask(model, REQUESTS, options)
    assert model.options["temperature"] == 0.7 and model.options["begin"] == "Sure: "
    assert [turns[0] for turns in model.dialogues] == [
        ("system", "Be good."), ("system", "Be good."), ("system", "Own."),
    ]  # fmt: skip
    assert [(row["item"], row["sample"]) for row in rows[:3]] == [(0, 0), (0, 1), (1, 0)]
    assert rows[0]["category"] == "a" and rows[0]["reference"] == "So." and rows[0]["finished"]
    judged = answers.judge(rows, judges.make(("start",))).rows
    assert answers.by_item(judged, "start", "refused") == [0, 0, 0]  # behind "Sure: "
    rows = answers.ask(Model(), REQUESTS, options._replace(prefix=""))
    judged = answers.judge(rows, judges.make(("start",))).rows
    assert answers.by_item(judged, "start", "refused") == [0.5, 0.5, 0.5]


def broken(spec, fails):
    """A judge that says "refused", but fails where `fails` says so."""

    def judge(asked):
        return [FAILED if fails(one) else Verdict(True, 1.0, "why") for one in asked]

    return Judge(spec, REFUSAL, judge)


def test_answers_are_kept_before_they_are_judged(tmp_path):
    sets = {"over_refusal": EvalSet(TASKS["over_refusal"], "here", REQUESTS)}
    model, kept = Model(), AnswerFiles(tmp_path / "evals")
    options = EvalOptions(judges=(broken("bad", lambda one: True),))
    with pytest.raises(JudgeError, match="'bad' failed on all 3 answers; the answers are kept"):
        evaluation.evaluate(model, sets, options, kept)
    options = EvalOptions(judges=(broken("bad", lambda one: one.request == "Why?"),))
    outcome = evaluation.evaluate(model, sets, options, kept)
    assert model.calls == 1  # not asked again
    assert outcome["over_refusal"]["refused"] == {"bad": [True, None, True]}
    summary = evaluation.summarise(sets, [outcome], options)["over_refusal"]
    assert summary["unjudged"] == 1 and summary["n"] == 2 and summary["rate"] == 100
    # Only what failed is judged again; the label stays.
    again = broken("bad", lambda one: one.request != "Why?")
    outcome = evaluation.evaluate(model, sets, EvalOptions(judges=(again,)), kept)
    assert outcome["over_refusal"]["refused"] == {"bad": [True, True, True]} and model.calls == 1
    (row, *_) = kept.read("over_refusal", {})
    assert row["verdicts"] == {"bad": {"refused": True, "score": 1.0, "label": "why"}}
    assert (row["task"], row["version"]) == ("over_refusal", 2) and len(row["prompts"]) == 16
    # Other prompts are asked.
    other = {"over_refusal": EvalSet(TASKS["over_refusal"], "here", REQUESTS[:2])}
    evaluation.evaluate(model, other, options, kept)
    assert model.calls == 2


def test_a_judge_of_harm_does_not_count_refusals_of_harmless_requests():
    harm = Judge("guard", HARM, lambda asked: [Verdict(True, 1.0)] * len(asked))
    options = EvalOptions(judges=(harm, *judges.make(("rules",))))
    sets = {name: EvalSet(TASKS[name], "here", REQUESTS) for name in ("advbench", "over_refusal")}
    outcome = evaluation.evaluate(Model(), sets, options)
    assert list(outcome["advbench"]["refused"]) == ["guard", "rules"]
    assert list(outcome["over_refusal"]["refused"]) == ["rules"]
    summary = evaluation.summarise(sets, [outcome], options)
    assert summary["advbench"]["safety"] == 100 and summary["over_refusal"]["rate"] == 0
    with pytest.raises(TaskError, match="'over_refusal' needs a judge of refusal, such as rules"):
        check_judges(select(("over_refusal",), TASKS), ("chat:m@http://a/v1#compare",))
