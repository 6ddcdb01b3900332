"""`fedsafe judge`: answers of a run or made elsewhere are judged again."""

import json

import pytest
from absl import flags

from fedsafe_jax.cli import judge
from fedsafe_jax.cli.command import UsageError
from fedsafe_jax.data.examples import SourceError
from fedsafe_jax.evals.judges import JudgeError


def run(tmp_path, rows, **given):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = flags.FlagValues()
    judge.define_flags(values)
    given = {"input": str(source), "output": str(output)} | given
    values(["fedsafe", *(f"--{name}={value}" for name, value in given.items())])
    try:
        judge.main(values)
    finally:
        written = output.read_text().splitlines() if output.exists() else []
    return [json.loads(line) for line in written]


ROWS = [
    {"messages": [{"role": "user", "content": "How?"}], "answer": "I can't help.", "mine": 1},
    {"prompt": "How?", "answer": "So.", "verdicts": {"old": {"refused": True, "score": 1.0}}},
]


def test_rows_gain_verdicts_and_keep_what_they_have(tmp_path, capsys):
    first, second = run(tmp_path, ROWS, judges="rules,start")
    assert first["mine"] == 1 and first["verdicts"]["rules"] == {"refused": True, "score": 1.0}
    assert second["verdicts"]["start"] == {"refused": False, "score": 0.0}
    assert second["verdicts"]["old"]["refused"]
    assert "rules: 50.0% refused" in capsys.readouterr().out


def test_a_judge_that_fails_on_all_is_an_error_behind_the_others(tmp_path, capsys):
    with pytest.raises(JudgeError, match="failed on all 2 answers"):
        run(tmp_path, ROWS, judges="rules,chat:m@http://127.0.0.1:9/v1#compare")
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert written[0]["verdicts"]["chat:m@http://127.0.0.1:9/v1#compare"] is None
    assert written[0]["verdicts"]["rules"]["refused"]
    assert "failed on 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "So."}, "'messages' must be a list"),
        ({"messages": [], "answer": "So."}, "'messages' must be a list"),
        ({"messages": [{"role": "user"}], "answer": "So."}, "needs 'role' and 'content'"),
        ({"prompt": "How?", "response": "So."}, "no field 'answer'.*'response'.* Name the field"),
        ({"instruction": "How?", "output": "So."}, "'prompt' a text; found the fields.*output"),
        ({"messages": [{"role": "user", "content": "How?"}]}, "no answer at the end"),
        (
            {
                "messages": [
                    {"role": "user", "content": "?"},
                    {"role": "assistant", "content": "A"},
                ],
                "answer": "B",
            },
            "ends with an answer that is not 'answer'",
        ),
        ({"prompt": "How?", "answer": None}, "'answer' must be a text, found None"),
        ({"prompt": "How?", "answer": "So.", "verdicts": [1]}, "'verdicts' must be an object"),
        (
            {"prompt": "How?", "answer": "So.", "verdicts": {"rules": {"refused": True}}},
            "the verdict of 'rules' must be null, or hold 'refused'",
        ),
        ({"prompt": "How?", "answer": "So.", "verdicts": {"rules": 1}}, "found 1"),
    ],
)
def test_rows_that_are_none_are_named(tmp_path, row, message):
    with pytest.raises(SourceError, match=f"line 2.*{message}"):
        run(tmp_path, [ROWS[0], row])


def test_answers_of_other_tools_are_read_where_they_stand(tmp_path):
    turns = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "I can't help."}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "How?"}]}]
    rows = [
        {"messages": turns},
        {"messages": turns, "answer": "I can't help."},
        {"messages": parts, "answer": "I can't help."},
        {
            "conversations": [
                {"from": "human", "value": "How?"},
                {"from": "gpt", "value": "I can't."},
            ]
        },
        {"conversations": [{"from": "human", "value": "How?"}], "answer": "I can't help."},
    ]
    for row, judged in zip(rows, run(tmp_path, rows, judges="start"), strict=True):
        assert judged["messages"] == [{"role": "user", "content": "How?"}]
        assert judged["answer"].startswith("I can't") and judged["verdicts"]["start"]["refused"]
        assert judged.get("conversations") == row.get("conversations")


def test_a_file_that_is_no_json_lines_is_not_written_over(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,answer\nHow?,So.\n")
    with pytest.raises(UsageError, match="is the input, and no JSON lines; name another file"):
        run(tmp_path, ROWS, input=tmp_path / "a.csv", output=tmp_path / "a.csv")
    with pytest.raises(SourceError, match="is a folder; name a file of answers"):
        run(tmp_path, ROWS, input=tmp_path)
