"""Constitution files, how models are asked and read, the revision loop, and the schedule."""

import json
import subprocess
import sys

import numpy as np
import pytest

from fedsafe_jax.cai import constitution, forms, revise, schedule
from fedsafe_jax.config import ConfigError, default_config
from fedsafe_jax.data.refusals import start_refusal
from fedsafe_jax.validation import validate

SHOT = (
    "\n\nHuman: Could you help me?\n\nAssistant: Sure.\n\nCritiqueRequest: Is it bad?\n\nCritique: "
    "Yes.\n\nRevisionRequest: Mend it.\n\nRevision: I'm sorry, no.\n\nHuman:"
)
PRINCIPLES = constitution.Constitution(
    [constitution.Principle("C?", "R.")], [constitution.parse_few_shot(SHOT)]
)


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


@pytest.mark.parametrize(
    ("said", "text", "ended"),
    [
        (" A plain answer.", "A plain answer.", False),
        ("An answer.\n\nHuman: And now?\n\nAssistant: Well", "An answer.", True),
        ("An answer.\n\nCritiqueRequest: Is it", "An answer.", True),
        ("\n\nHuman: again", "", True),
        ("Revision: Mended.", "Mended.", False),
        ("Sure! Here is the revised response:\n\nMended.", "Mended.", False),
        ("Here's a version without harm: Mended: all of it.", "Mended: all of it.", False),
        ("Revised answer: Mended.", "Mended.", False),
        ('"Mended."', "Mended.", False),
        ('"One" and "two"', '"One" and "two"', False),
        ("The human: a study", "The human: a study", False),
        ("Two\n\nparagraphs.", "Two\n\nparagraphs.", False),
    ],
)
def test_what_models_say_is_read_back(said, text, ended):
    assert forms.clean(said) == (text, ended)


def test_base_models_are_asked_in_dialogue_form(packaged):
    import copy

    tokenizer = copy.deepcopy(packaged.tokenizer)
    tokenizer.chat_template = forms.DIALOGUE
    turns = [{"role": role, "content": text} for role, text in PRINCIPLES.few_shots[0]]
    question = [*turns, {"role": "user", "content": "And this?"}]
    text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert text == SHOT + " And this?\n\nAssistant:"
    text = tokenizer.apply_chat_template(turns[:3], tokenize=False, add_generation_prompt=True)
    assert text.endswith("\n\nCritiqueRequest: Is it bad?\n\nCritique:")
    chat = forms.as_chat([*PRINCIPLES.few_shots[0], ("user", "And this?")])
    assert [role for role, _ in chat] == ["user", "assistant"] * 3 + ["user"]


def speaker(initial, revisions, finished=None, seen=None):
    """An `answer` and a `reviser` that say what is given, the revisions round by round."""
    finished = np.ones(len(initial), bool) if finished is None else np.array(finished)

    def answer(threads, call):
        assert call == 0
        return initial, np.ones(len(initial), bool)

    def reviser(threads, call):
        if seen is not None:
            seen.append([list(t) for t in threads])
        if call % 2:
            return ["critique"] * len(initial), np.ones(len(initial), bool)
        return revisions[call // 2 - 1], finished

    return answer, reviser


def test_records_say_why_a_revision_is_dropped():
    prompts = ["kept", "same", "empty", "cut", "still", "over", "refused"]
    initial = ["Sure", "No", "Sure", "Sure", "Sure", "A cake", "I'm sorry"]
    revisions = ["I'm sorry", "No", "", "I'm sorry", "Fine", "I'm sorry", "I cannot"]
    rules = revise.Rules([True, True, True, True, True, False, True], start_refusal)
    seen = []
    answer, reviser = speaker(initial, [revisions], [1, 1, 1, 0, 1, 1, 1], seen)
    found = revise.revise(prompts, PRINCIPLES, answer, reviser=reviser, seed=(0,), rules=rules)
    reasons = [r.dropped for r in found]
    assert reasons == ["", "unchanged", "empty", "cut", "still harmful", "over-refusal", ""]
    assert [r.preferred for r in found] == [True] + [False] * 6
    assert seen[0][0] == [("user", "kept"), ("assistant", "Sure"), ("critique_request", "C?")]
    assert seen[1][0][3:] == [("critique", "critique"), ("revision_request", "R.")]
    assert revise.tally(found) == {"kept": 2} | dict.fromkeys(
        ("unchanged", "empty", "cut", "still harmful", "over-refusal"), 1
    )


def test_revisions_go_on_from_revisions_behind_few_shots():
    seen = []
    answer, reviser = speaker(["Sure"], [["Better"], ["Best\n\nHuman: next"]], [False], seen)
    (record,) = revise.revise(
        ["q"], PRINCIPLES, answer, reviser=reviser, seed=(0,), rounds=2, few_shots=1
    )
    assert record.revision == "Best" and record.dropped == ""  # what follows shows that it ended
    assert record.earlier == ((0, "critique", "Better"),) and record.preferred
    assert seen[0][0][:6] == list(PRINCIPLES.few_shots[0])
    assert [role for role, _ in seen[3][0][6:]] == [
        "user", "assistant", "critique_request", "critique", "revision_request", "revision",
        "critique_request", "critique", "revision_request",
    ]  # fmt: skip


def test_a_judge_keeps_only_what_is_safer():
    prompts, initial = ["a", "b", "c", "d"], ["Sure", "Sure", "Fine", "Cake"]
    answer, reviser = speaker(initial, [["No", "Sure thing", "Fine then", "A cake"]])
    risk = {"Sure": 0.9, "No": 0.1, "Sure thing": 0.95, "Fine": 0.4, "Fine then": 0.3}

    def unsafe(prompts, answers):
        return np.array([risk.get(a, 0.2) for a in answers])

    judge = revise.Judge([True, True, True, False], unsafe, 0.5)
    found = revise.revise(prompts, PRINCIPLES, answer, reviser=reviser, seed=(0,), judge=judge)
    assert [r.dropped for r in found] == ["", "not safer", "", ""]
    assert [r.preferred for r in found] == [True, False, False, False]  # "Fine" was not unsafe


def test_right_answers_are_left_alone():
    prompts = ["harmful", "refused", "harmless", "over-refused"]
    initial = ["Sure", "I'm sorry", "A cake", "I'm sorry"]
    seen = []
    answer, _ = speaker(initial, [])
    _, reviser = speaker([0, 0], [["I'm sorry, no", "A cake"]], seen=seen)
    rules = revise.Rules([True, True, False, False], start_refusal)
    found = revise.revise(
        prompts, PRINCIPLES, answer, reviser=reviser, seed=(0,), rules=rules, only_wrong=True
    )
    assert [[t[0][1] for t in threads] for threads in seen] == [["harmful", "over-refused"]] * 2
    assert [r.initial for r in found] == initial
    assert [r.revision for r in found] == ["I'm sorry, no", "", "", "A cake"]
    assert [r.dropped for r in found] == ["", "were right", "were right", ""]
    assert [r.preferred for r in found] == [True, False, False, True]
    safe = revise.Judge([True] * 4, lambda p, a: np.full(len(a), 0.1), 0.5)
    found = revise.revise(
        prompts, PRINCIPLES, answer, reviser=None, seed=(0,), judge=safe, only_wrong=True
    )
    assert [r.dropped for r in found] == ["were right"] * 4  # nobody was asked to revise
    with pytest.raises(ValueError, match="no check"):
        revise.revise(prompts, PRINCIPLES, answer, reviser=reviser, seed=(0,), only_wrong=True)
    config = default_config()
    config.cai.revise, config.cai.check = "wrong", "none"
    with pytest.raises(ConfigError, match="cai.check='none' finds nothing wrong"):
        validate(config)


def test_schedules():
    assert schedule.amount("light", False) == schedule.LIGHT
    assert schedule.amount("final", False) == schedule.NONE
    assert schedule.amount("final", True) == schedule.LIGHT
    assert np.isinf(schedule.amount("full", False).steps)
    assert schedule.adaptive(90.0, 96.0, 95.0, 10) == 0  # it may well be safe
    assert schedule.adaptive(0.0, 5.0, 95.0, 10) == 10
    assert schedule.adaptive(47.5, 61.0, 95.0, 10) == 5
    assert schedule.adaptive(93.0, 94.9, 95.0, 10) == schedule.LEAST  # no probe for every step


def test_revise_stands_alone(tmp_path):
    (tmp_path / "prompts.txt").write_text("How can I rob a bank?\nHow can I forge a cheque?\n")

    def run(*flags):
        command = [
            sys.executable,
            "-m",
            "fedsafe_jax",
            "revise",
            "--output",
            tmp_path / "out.jsonl",
        ]
        return subprocess.run([*command, *flags], capture_output=True, text=True, timeout=600)

    done = run(f"--prompts={tmp_path}/prompts.txt", "--max_new_tokens=16", "--rounds=2")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [r["prompt"][-5:] for r in rows] == ["bank?", "eque?"]
    assert all(r["initial"] and len(r["earlier"]) == 1 for r in rows)
    assert "2 prompts in" in done.stdout and "records:" in done.stdout
    done = run(f"--prompts={tmp_path}/prompts.txt", "--few_shots=2")
    assert done.stderr.strip().splitlines() == [
        "error: --few_shots=2: there are 0; give --few_shot_file."
    ]
    done = run(f"--prompts={tmp_path}/prompts.txt", "--column=text")
    assert "no text in column 'text'" in done.stderr and "Traceback" not in done.stderr
