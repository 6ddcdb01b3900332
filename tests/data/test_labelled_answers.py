"""Answers with human labels: forms of files, and who answered."""

import json

import pytest

from fedsafe_jax.data import labelled_answers
from fedsafe_jax.data.examples import SourceError


def write(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder)


def test_xstest(tmp_path):
    text = (
        "prompt,completion,final_label\n"
        "How?, So. ,1_full_compliance\nWhy?,No.,2_full_refusal\nWho?,Perhaps.,3_partial_refusal\n"
    )
    rows = labelled_answers.read("m=xstest:a.csv", write(tmp_path, "a.csv", text))
    assert [(row.answer, row.label, row.model) for row in rows] == [
        ("So.", "compliance", "m"), ("No.", "refusal", "m"), ("Perhaps.", "partial", "m"),
    ]  # fmt: skip
    assert rows[0].messages == (("user", "How?"),)


def test_do_not_answer_has_columns_for_each_model(tmp_path):
    text = "question,a_response,a_action,b_response,b_action\nHow?,No.,0,So.,5.0\n"
    folder = write(tmp_path, "d.csv", text)
    both = labelled_answers.read("do_not_answer:d.csv", folder)
    assert [(row.model, row.answer, row.label) for row in both] == [
        ("a", "No.", "refuses"), ("b", "So.", "follows"),
    ]  # fmt: skip
    assert [row.model for row in labelled_answers.read("b=do_not_answer:d.csv", folder)] == ["b"]
    with pytest.raises(SourceError, match="no field 'c_action'"):
        labelled_answers.read("c=do_not_answer:d.csv", folder)


def test_answers_name_their_model_or_the_source_does(tmp_path):
    turns = [{"role": "system", "content": "S"}, {"role": "user", "content": "How?"}]
    rows = [
        {"messages": turns, "answer": "No.", "label": "refusal", "model": "a"},
        {"prompt": "How?", "answer": "", "label": "compliance"},
    ]
    folder = write(tmp_path, "r.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    read = labelled_answers.read("b=answers:r.jsonl", folder)
    assert [row.model for row in read] == ["a", "b"] and read[0].messages[0] == ("system", "S")
    with pytest.raises(SourceError, match="line 2: no model is named"):
        labelled_answers.read("answers:r.jsonl", folder)


@pytest.mark.parametrize(
    ("source", "text", "message"),
    [
        ("xstest", "", "write MODEL=FORM:LOCATION"),
        ("m=xtest:a.csv", "", "Did you mean 'xstest'"),
        ("m=xstest:a.csv", "prompt,completion,final_label\nHow?,So.,4\n", "'final_label' must be"),
        ("do_not_answer:a.csv", "question,a_response,a_action\nHow?,So.,6\n", "'a_action' must be"),
        ("do_not_answer:a.csv", "question,a_response\nHow?,So.\n", "no field 'MODEL_action'"),
        ("m=answers:a.csv", "prompt,answer\nHow?,So.\n", "no field 'label'"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, source, text, message):
    with pytest.raises(SourceError, match=message):
        labelled_answers.read(source, write(tmp_path, "a.csv", text))
