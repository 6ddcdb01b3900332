"""Prompt files of commands, and what commands say of pairs."""

import json

import numpy as np
import pytest

from fedsafe_jax.cli import filter_pairs, train_filter
from fedsafe_jax.cli.command import check_file
from fedsafe_jax.cli.evaluate import run_prompts
from fedsafe_jax.cli.prompts import read_prompts, repeats
from fedsafe_jax.data.examples import Example, SourceError
from fedsafe_jax.evals.task import EvalOptions
from fedsafe_jax.filters.decision import Decision

KNOT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "I tie a knot."},
    {"role": "assistant", "content": "Good."},
    {"role": "user", "content": "How long does it take?"},
]


def write(folder, *rows):
    file = folder / "p.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (5, "line 2: column 'ask' holds 5; expected a text, or a list of {role, content}"),
        (None, "line 2: column 'ask' holds None; expected a text"),
        ("  \n", "line 2: column 'ask' is blank; write a prompt, or remove the row"),
        ("", "line 2: column 'ask' is blank"),
        ([], r"line 2: column 'ask' holds \[\]; expected"),
        (["How?"], r"line 2: column 'ask' holds \['How\?'\]; expected"),
        ({"role": "user"}, "line 2: column 'ask' holds {'role': 'user'}; expected"),
        ([{"role": "user", "content": " "}], "line 2: .*blank|line 2: .*empty"),
        ([{"role": "user"}], "line 2: .*'content'"),
    ],
)
def test_what_is_no_prompt_is_one_line_with_its_row(tmp_path, value, message):
    file = write(tmp_path, {"ask": "How?"}, {"ask": value})
    with pytest.raises(SourceError, match=message) as error:
        read_prompts(file, "ask")
    assert "\n" not in str(error.value)


def test_a_missing_column_names_those_that_are_there(tmp_path):
    with pytest.raises(SourceError, match=r"line 1: no column 'prompt'; found \['ask'\]. Set"):
        read_prompts(write(tmp_path, {"ask": "How?"}), "prompt")


class Echo:
    """Answers with what it is asked."""

    def answer_dialogues(self, dialogues, **options):
        texts = [" / ".join(f"{role} {text}" for role, text in turns) for turns in dialogues]
        return texts, np.ones(len(texts), bool)


def test_messages_are_asked_as_a_dialogue(tmp_path, capsys):
    rows = [{"ask": KNOT}, {"ask": KNOT[-1:]}, {"ask": KNOT[-1]["content"]}]
    requests = read_prompts(write(tmp_path, *rows), "ask")
    lines = run_prompts(Echo(), requests, EvalOptions())["prompts"]
    assert lines[0]["answer"] == (
        "system Be brief. / user I tie a knot. / assistant Good. / user How long does it take?"
    )
    assert lines[0]["messages"] == KNOT
    assert lines[0]["prompt"].startswith("system: Be brief.\n\nuser: I tie a knot.")
    assert (
        lines[1] | {"item": 2} == lines[2] and lines[1]["answer"] == "user How long does it take?"
    )
    assert lines[1]["verdicts"]["rules"] == {"refused": False, "score": 0.1}
    said = capsys.readouterr().out
    assert "note: 1 of 3 prompts are repeats of earlier rows; all are asked and counted." in said
    assert repeats(requests[:2]) == ""  # they end in the same turn, and are not the same


def test_quality_on_one_label_is_not_defined():
    rows = [{"label": "safe", "action": action} for action in ("keep", "drop")]
    assert filter_pairs.measured(rows) == (
        "2 labelled, all safe: precision n/a, recall n/a, harmonic mean n/a, accuracy 50.0"
    )
    rows.append({"label": "unsafe", "action": "drop"})
    assert "precision 50.0, recall 100.0" in filter_pairs.measured(rows)


def test_quality_on_held_out_pairs_of_one_label_is_null(capsys):
    class Fixed:
        decision = Decision(threshold=0.5)

        def score(self, pairs):
            return np.full(len(pairs), 0.1)

    pairs = [Example((("user", f"How {i}?"),), "So.", "safe") for i in range(4)]
    found = train_filter.measure(Fixed(), pairs, share=0.3, seed=0)
    assert [found[name] for name in ("precision", "recall", "hmean", "auroc")] == [None] * 4
    assert found["accuracy"] == 100 and "NaN" not in json.dumps(found)
    train_filter.print_quality(found)
    assert "AUROC n/a, precision n/a, recall n/a" in capsys.readouterr().out


def test_a_missing_folder_of_output_is_made_before_anything_is_scored(tmp_path, monkeypatch):
    rows = write(tmp_path, {"prompt": "How?", "response": "So."})
    output = tmp_path / "new" / "folder" / "out.jsonl"

    def score(folder, pairs, action, threshold):
        assert output.parent.is_dir()
        return [row | {"p_unsafe": 0.1, "action": "keep"} for row, _ in pairs]

    monkeypatch.setattr(filter_pairs, "score", score)

    class Values:
        filter, input, action, threshold, samples = "f", rows, "drop", 0.5, 0

    Values.output = str(output)
    filter_pairs.main(Values)
    assert json.loads(output.read_text())["action"] == "keep"
    check_file("output", str(output))
