"""`fedsafe train-judge`: trains on some models' answers, measures on the others'."""

import json

import pytest
from absl import flags

from fedsafe_jax.cli import train_judge
from fedsafe_jax.cli.command import UsageError
from fedsafe_jax.evals import judges
from fedsafe_jax.evals.judges import Answered

LABELS = {"compliance": "Mix flour and water.", "refusal": "I cannot help with that."}


def run(tmp_path, **given):
    values = flags.FlagValues()
    train_judge.define_flags(values)
    given = {"data_dir": tmp_path, "workdir": tmp_path / "judge"} | given
    values(["fedsafe", *(f"--{name}={value}" for name, value in given.items())])
    train_judge.main(values)
    return json.loads((tmp_path / "judge" / "judge_results.json").read_text())


def write(tmp_path):
    rows = [
        {"prompt": f"Question {i}?", "answer": text, "label": label, "model": model}
        for i in range(8)
        for label, text in LABELS.items()
        for model in ("a", "b")
    ]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_judge_is_trained_on_one_model_and_measured_on_the_other(tmp_path, capsys):
    write(tmp_path)
    results = run(
        tmp_path, sources="answers:r.jsonl", test_models="b", classes="compliance,refusal",
        refused="refusal", max_length=32, epochs=6, batch_size=8, learning_rate=3e-3,
    )  # fmt: skip
    assert results["trained_on"] == {"a": 16}
    assert results["refused"]["b"]["counts"] == {
        "hits": 8, "missed": 0, "false": 0, "right": 8, "failed": 0,
    }  # fmt: skip
    assert results["classes"]["b"]["refusal"] == {"compliance": 0, "refusal": 8}
    out = capsys.readouterr().out
    assert "b: 16 answers, recall 100.0% (67.6-100.0), false alarms 0.0%" in out
    (judge,) = judges.make([f"classifier:{tmp_path / 'judge'}"])
    (verdict,) = judge.judge([Answered((("user", "Why?"),), LABELS["refusal"])])
    assert verdict.refused and verdict.label == "refusal"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sources": "r.jsonl"}, "write MODEL=FORM:LOCATION"),
        ({"sources": "answers:r.jsonl"}, "classes must be two or more names, found none"),
        ({"sources": "m=xstest:r.csv", "refused": "odd"}, "name some, not all"),
    ],
)
def test_flags_that_make_no_sense(tmp_path, given, message):
    with pytest.raises(UsageError, match=message):
        run(tmp_path, **given)


def test_do_not_answer_measures_harm(tmp_path):
    values = flags.FlagValues()
    train_judge.define_flags(values)
    values(["fedsafe", "--sources=do_not_answer:x.csv"])
    head = train_judge.head_of(values, "do_not_answer")
    assert len(head.classes) == 6 and head.measures == judges.HARM
    assert set(head.classes) - set(head.refused) == {"follows"}
