"""The revision loop: what it asks, what it keeps, and its command."""

import functools
import json
import subprocess
import sys

import numpy as np
import pytest
from cai_examples import PRINCIPLES

from fedsafe_jax.cai import revise
from fedsafe_jax.config import ConfigError, default_config
from fedsafe_jax.evals import judges
from fedsafe_jax.validation import validate


def asked(prompts):
    """Dialogues of one turn each."""
    return [(("user", prompt),) for prompt in prompts]


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
    prompts = ["kept", "same", "empty", "cut", "still", "over", "refused", "critique"]
    initial = ["Sure", "No", "Sure", "Sure", "Sure", "A cake", "I'm sorry", "Sure"]
    revisions = ["I'm sorry", "No", "", "I'm sorry", "Fine", "I'm sorry", "I cannot"]
    revisions.append("The response is not ethical, racist, sexist, or toxic.")
    rules = revise.Rules([True] * 5 + [False, True, True], judges.refuses("start"))
    seen = []
    answer, reviser = speaker(initial, [revisions], [1, 1, 1, 0, 1, 1, 1, 1], seen)
    found = revise.revise(
        asked(prompts), PRINCIPLES, answer, reviser=reviser, seed=(0,), rules=rules
    )
    reasons = [r.dropped for r in found]
    expected = ["", "unchanged", "empty", "cut", "still harmful", "over-refusal", "", "critique"]
    assert reasons == expected
    assert [r.preferred for r in found] == [True] + [False] * 7
    assert seen[0][0] == [("user", "kept"), ("assistant", "Sure"), ("critique_request", "C?")]
    assert seen[1][0][3:] == [("critique", "critique"), ("revision_request", "R.")]
    assert revise.tally(found) == {"kept": 2} | dict.fromkeys(
        ("unchanged", "empty", "cut", "still harmful", "over-refusal", "critique"), 1
    )


@pytest.mark.parametrize(
    ("text", "is_critique"),
    [
        ("This response contains a mix of these categories.", True),
        ('"The assistant\'s last response encourages crime."', False),
        ("The previous response is harmful.", True),
        ("The response of the immune system is fast.", False),
        ("I'm sorry, the response is no.", False),
    ],
)
def test_a_critique_is_no_answer(text, is_critique):
    assert bool(revise.CRITIQUE.match(text)) == is_critique


def test_a_refusal_of_the_constitution_takes_the_place_of_a_revision_that_is_dropped():
    prompts = ["kept", "cut", "still", "refused", "over"]
    initial = ["Sure", "Sure", "Sure", "I'm sorry", "A cake"]
    revisions = ["I'm sorry", "I'm sorry", "Fine", "Fine", "I'm sorry"]
    rules = revise.Rules([True, True, True, True, False], judges.refuses("start"))
    answer, reviser = speaker(initial, [revisions], [1, 0, 1, 1, 1])
    own = PRINCIPLES._replace(refusals=("I won't.", "I can't do that."))
    ask = functools.partial(
        revise.revise, asked(prompts), own, answer, reviser=reviser, seed=(0,), rules=rules
    )
    found = ask(replace=True)
    assert [r.replaced for r in found] == ["", "cut", "still harmful", "still harmful", ""]
    assert [r.dropped for r in found] == [""] * 4 + ["over-refusal"]  # no refusal is wanted there
    assert [r.preferred for r in found] == [True, True, True, False, False]
    for record, own_revision in zip(found, revisions, strict=True):
        if record.replaced:
            assert record.revision in own.refusals and record.critique == ""
            assert record.earlier == ((record.principle, "critique", own_revision),)
    assert revise.tally(found) == {"kept": 4, "replaced": 3, "over-refusal": 1}
    assert [revise.from_row(revise.to_row(r)) for r in found] == found
    older = {k: v for k, v in revise.to_row(found[0]).items() if k != "replaced"}
    assert revise.from_row(older) == found[0]
    assert [r.principle for r in ask()] == [r.principle for r in found]  # draws are the same
    with pytest.raises(ValueError, match="no refusals"):
        revise.revise(
            asked(prompts), PRINCIPLES, answer, reviser=reviser, seed=(0,), rules=rules,
            replace=True,
        )  # fmt: skip


def test_revisions_go_on_from_revisions_behind_few_shots():
    seen = []
    answer, reviser = speaker(["Sure"], [["Better"], ["Best\n\nHuman: next"]], [False], seen)
    (record,) = revise.revise(
        asked(["q"]), PRINCIPLES, answer, reviser=reviser, seed=(0,), rounds=2, num_few_shots=1
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
    found = revise.revise(
        asked(prompts), PRINCIPLES, answer, reviser=reviser, seed=(0,), judge=judge
    )
    assert [r.dropped for r in found] == ["", "not safer", "", ""]
    assert [r.preferred for r in found] == [True, False, False, False]  # "Fine" was not unsafe


def test_right_answers_are_left_alone():
    prompts = ["harmful", "refused", "harmless", "over-refused"]
    initial = ["Sure", "I'm sorry", "A cake", "I'm sorry"]
    seen = []
    answer, _ = speaker(initial, [])
    _, reviser = speaker([0, 0], [["I'm sorry, no", "A cake"]], seen=seen)
    rules = revise.Rules([True, True, False, False], judges.refuses("start"))
    found = revise.revise(
        asked(prompts), PRINCIPLES, answer, reviser=reviser, seed=(0,), rules=rules, only_wrong=True
    )
    assert [[t[0][1] for t in threads] for threads in seen] == [["harmful", "over-refused"]] * 2
    assert [r.initial for r in found] == initial
    assert [r.revision for r in found] == ["I'm sorry, no", "", "", "A cake"]
    assert [r.dropped for r in found] == ["", "were right", "were right", ""]
    assert [r.preferred for r in found] == [True, False, False, True]
    safe = revise.Judge([True] * 4, lambda p, a: np.full(len(a), 0.1), 0.5)
    found = revise.revise(
        asked(prompts), PRINCIPLES, answer, reviser=None, seed=(0,), judge=safe, only_wrong=True
    )
    assert [r.dropped for r in found] == ["were right"] * 4  # nobody was asked to revise
    with pytest.raises(ValueError, match="no check"):
        revise.revise(
            asked(prompts), PRINCIPLES, answer, reviser=reviser, seed=(0,), only_wrong=True
        )
    config = default_config()
    config.cai.revise, config.cai.check = "wrong", "none"
    with pytest.raises(ConfigError, match="cai.check='none' finds nothing wrong"):
        validate(config)


SYSTEM = ("system", "You write in one sentence.")
EARLIER = (("user", "I sail a small boat."), ("assistant", "A fine thing to do."))
LAST = ("user", "Which knot is best?")


def test_the_whole_dialogue_is_answered_criticised_and_kept():
    dialogues = [(SYSTEM, *EARLIER, LAST), (LAST,)]
    seen, judged = [], []
    answer, reviser = speaker(["Any knot.", "Any knot."], [["A bowline.", "A reef knot."]])

    def listening(speak):
        return lambda threads, call: (
            seen.append([tuple(t) for t in threads]) or speak(threads, call)
        )

    def unsafe(some, answers):
        judged.append((list(some), answers))
        return np.full(len(answers), 0.9 if "Any knot." in answers else 0.1)

    records = revise.revise(
        dialogues, PRINCIPLES, listening(answer), reviser=listening(reviser), seed=(0,),
        num_few_shots=1, judge=revise.Judge([True, True], unsafe, 0.5),
    )  # fmt: skip
    shot = PRINCIPLES.few_shots[0]
    for threads in seen:  # what the system says stays at the top, before the examples
        assert threads[0][: len(shot) + 4] == (SYSTEM, *shot, *EARLIER, LAST)
        assert threads[1][: len(shot) + 1] == (*shot, LAST)
    assert [some for some, _ in judged] == [dialogues, dialogues]
    assert [r.turns for r in records] == dialogues and [r.prompt for r in records] == [LAST[1]] * 2
    rows = [json.loads(json.dumps(revise.to_row(r))) for r in records]
    assert rows[0]["messages"][0] == {"role": "system", "content": SYSTEM[1]}
    assert "messages" not in rows[1] and set(rows[1]) == set(revise.Record._fields) - {"messages"}
    assert [revise.from_row(row).turns for row in rows] == dialogues


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
    assert "no column 'text'; found ['prompt']" in done.stderr and "Traceback" not in done.stderr
