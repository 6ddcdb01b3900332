"""Constitution files in both public forms."""

import json

import pytest
from cai_examples import SHOT

from fedsafe_jax.cai import constitution, forms


def test_both_public_forms_of_a_constitution(tmp_path):
    ours = constitution.load("package:constitution")
    assert len(ours.principles) == 6
    assert ours.principles[0].critique_request.startswith("Say whether")
    raw = {
        "harmful0": {
            "prompt": ["\n\nCritiqueRequest: Is it bad?\n\nCritique:"],
            "edit_request": "\n\nRevisionRequest: Mend it.\n\nRevision:",
        }
    }
    path, shots = tmp_path / "c.json", tmp_path / "shots.json"
    path.write_text(json.dumps(raw))
    shots.write_text(json.dumps([SHOT]))
    found = constitution.load(str(path), str(shots))
    assert found.principles == [constitution.Principle("Is it bad?", "Mend it.")]
    roles = [role for role, _ in found.few_shots[0]]
    assert roles == list(forms.LABELS)  # the empty turn at the end is none
    assert found.few_shots[0][3] == ("critique", "Yes.")
    turns = [{"role": role, "content": str(i)} for i, role in enumerate(["user", "assistant"] * 4)]
    swarm = {"constitutions": [{"critic": "a", "revision": "b"}], "system_chat": [turns]}
    path.write_text(json.dumps(swarm))
    (shot,) = constitution.load(str(path)).few_shots
    assert [r for r, _ in shot[4:]] == ["critique_request", "critique", "revision_request"] + [
        "revision"
    ]
    assert [text for _, text in shot] == list("01234567")


@pytest.mark.parametrize(
    ("text", "shots", "message"),
    [
        ('{"constitutions": [{"critic": "x"}]}', "", "expected critic/revision"),
        ('{"constitutions": []}', "", "holds no principle"),
        ('{"constitutions": [{"critic": 7, "revision": "y"}]}', "", "principle 1 holds 7"),
        ('{"constitutions": [{"critic": null, "revision": "y"}]}', "", "principle 1 holds None"),
        ('{"a": {"prompt": [], "edit_request": []}}', "", "expected critic/revision"),
        ('{"a": {"prompt": [[]], "edit_request": ["x"]}}', "", "expected critic/revision"),
        ("[" * 99_999, "", "nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "", "5000 digits"),
        (
            '{"constitutions": [{"critic": "' + "x" * 200_000 + '", "revision": "y"}]}',
            "",
            "at most",
        ),
        (f'{{"constitutions": [{",".join(["{}"] * 3)}]}}', "", "expected critic/revision"),
        (
            '{"constitutions": [{"critic": "x", "revision": "y"}], "system_chat": '
            '[[{"role": 7, "content": "a"}]]}',
            "",
            "example 0 ",
        ),
        ("{", "", "not JSON"),
        ('{"constitutions": [{"critic": "x", "revision": "y"}]}', '{"a": 1}', "list of dialogues"),
        ('{"constitutions": [{"critic": "x", "revision": "y"}]}', '["Human: a"]', "example 0"),
    ],
)
def test_bad_constitutions_are_named(tmp_path, text, shots, message):
    path = tmp_path / "c.json"
    path.write_text(text)
    if shots:
        (tmp_path / "s.json").write_text(shots)
        shots = str(tmp_path / "s.json")
    with pytest.raises(constitution.ConstitutionError, match=message):
        constitution.load(str(path), shots)
