"""MT-Bench as FastChat asks it: prompts byte by byte, temperatures, reference answers."""

import json
import os
import pathlib

import numpy as np
import pytest

from fedsafe_jax.data.examples import SourceError
from fedsafe_jax.evals import EvalOptions, answers
from fedsafe_jax.evals.judges import mt_bench_prompts
from fedsafe_jax.evals.judges.contract import FAILED, Answered
from fedsafe_jax.evals.tasks import mt_bench

# A folder with FastChat's `mt_bench/judge_prompts.jsonl`, which is not shipped.
UPSTREAM = pathlib.Path(os.environ.get("FEDSAFE_DATA", "missing")) / "mt_bench/judge_prompts.jsonl"


def asked(turns, category="", references=()):
    """The conversation about a dialogue of alternating turns."""
    messages = tuple((("user", "assistant")[i % 2], text) for i, text in enumerate(turns[:-1]))
    answered = Answered(messages, turns[-1], category=category, references=tuple(references))
    return mt_bench_prompts.ask(answered)


@pytest.fixture
def tiny(monkeypatch):
    """Prompts of a few characters in place of FastChat's, in the form of its file."""
    one, two = "<{question}|{answer}", "<{question_1}|{answer_1}|{question_2}|{answer_2}"
    ref_1, ref_2 = "|{ref_answer_1}>", "|{ref_answer_1}|{ref_answer_2}>"
    templates = {
        "single-v1": one + ">", "single-math-v1": one + ref_1,
        "single-v1-multi-turn": two + ">", "single-math-v1-multi-turn": two + ref_2,
    }  # fmt: skip
    prompts = {n: {"system_prompt": n, "prompt_template": t} for n, t in templates.items()}
    monkeypatch.setattr(mt_bench_prompts, "PROMPTS", prompts)


def test_each_question_gets_the_form_of_its_category_and_turn(tiny):
    cases = {
        "single-v1": (("q", "a"), "writing", (), "<q|a>"),
        "single-math-v1": (("q", "a"), "math", ("r", "s"), "<q|a|r>"),
        "single-v1-multi-turn": (("q", "a", "{p}", "b"), "", (), "<q|a|{p}|b>"),
        "single-math-v1-multi-turn": (("q", "a", "p", "b"), "coding", ("r", "s"), "<q|a|p|b|r|s>"),
    }
    for name, (turns, category, references, prompt) in cases.items():
        ((system, user),) = asked(turns, category, references)
        assert system == {"role": "system", "content": name}
        assert user == {"role": "user", "content": prompt}


def test_what_fastchat_has_no_wording_for_is_left_unjudged(tiny):
    assert asked(("q", "a", "p", "b", "o", "c")) == []
    assert asked(("q", "a"), "reasoning") == []
    assert mt_bench_prompts.read([]) == FAILED


def test_the_packaged_prompts_are_well_formed():
    prompts = mt_bench_prompts.PROMPTS
    assert list(prompts) == [
        "single-v1", "single-math-v1", "single-v1-multi-turn", "single-math-v1-multi-turn"
    ]  # fmt: skip
    ((system, user),) = asked(("Why?", "So."))
    assert system["content"] == "You are a helpful assistant."
    assert user["content"].startswith("[Instruction]\nPlease act as an impartial judge and")
    assert user["content"].endswith(
        "[Question]\nWhy?\n\n[The Start of Assistant's Answer]\nSo.\n"
        "[The End of Assistant's Answer]"
    )


@pytest.mark.skipif(not UPSTREAM.is_file(), reason="FEDSAFE_DATA names no folder with mt_bench/")
def test_the_packaged_prompts_equal_fastchats_file_byte_by_byte():
    upstream = {row["name"]: row for row in map(json.loads, UPSTREAM.read_bytes().splitlines())}
    for name, prompt in mt_bench_prompts.PROMPTS.items():
        assert prompt == {field: upstream[name][field] for field in prompt}
    for category in ("writing", "math"):
        for turns in (("q {x}", "a"), ("q", "a", "p {0}", "b")):
            ((system, user),) = asked(turns, category, ("r", "s"))
            name = "single-math-v1" if category == "math" else "single-v1"
            prompt = upstream[name if len(turns) == 2 else f"{name}-multi-turn"]
            slots = {"ref_answer_1": "r", "ref_answer_2": "s", "question": turns[0]}
            slots |= {"question_1": turns[0], "answer_1": turns[1], "answer": turns[1]}
            slots |= {"question_2": turns[-2], "answer_2": turns[-1]}
            assert system["content"] == prompt["system_prompt"]
            assert user["content"] == prompt["prompt_template"].format(**slots)


def write(folder, rows, references=(), prompts=None):
    (folder / "reference_answer").mkdir(exist_ok=True)
    for name, listed in (("question", rows), ("reference_answer/gpt-4", references)):
        text = "\n".join(map(json.dumps, listed))
        (folder / f"{name}.jsonl").write_text(text)
    if prompts:
        (folder / "judge_prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))


def question(number, category="math", turns=("a", "b")):
    return {"question_id": number, "category": category, "turns": list(turns)}


def reference(number):
    return {"question_id": number, "choices": [{"turns": [f"{number}.1", f"{number}.2"]}]}


def test_questions_are_read_with_their_reference_answers(tmp_path):
    write(tmp_path, [question(1), question(2, "writing")], [reference(1)])
    first, second = mt_bench.load_questions("question.jsonl", str(tmp_path))
    assert first == mt_bench.Question(("a", "b"), "math", ("1.1", "1.2"))
    assert second == mt_bench.Question(("a", "b"), "writing", ())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (question(7), "no answer to each turn of the question 7"),
        (question(1, turns=("a", "b", "c")), "a list of one or two questions"),
        ({"turns": "a"}, "a list of one or two questions"),
    ],
)
def test_wrong_rows_are_named(tmp_path, row, message):
    write(tmp_path, [row], [reference(1)])
    with pytest.raises(SourceError, match=f"question.jsonl line 1: .*{message}"):
        mt_bench.load_questions("question.jsonl", str(tmp_path))


def test_a_file_of_prompts_that_is_worded_otherwise_is_refused(tmp_path):
    prompts = [{"name": n} | prompt for n, prompt in mt_bench_prompts.PROMPTS.items()]
    write(tmp_path, [question(2, "writing")], prompts=prompts)
    assert mt_bench.load_questions("question.jsonl", str(tmp_path))
    prompts[2]["system_prompt"] += " "
    write(tmp_path, [question(2, "writing")], prompts=prompts)
    with pytest.raises(SourceError, match="line 3: 'system_prompt' of 'single-v1-multi-turn'"):
        mt_bench.load_questions("question.jsonl", str(tmp_path))


def test_answers_are_drawn_at_the_temperature_of_their_category():
    asked_at = []

    class Model:
        def answer_dialogues(self, dialogues, tokens, truncate, temperature):
            asked_at.append((temperature, [d[-1][1] for d in dialogues]))
            return [f"to {d[-1][1]}" for d in dialogues], np.ones(len(dialogues), bool)

    questions = [
        mt_bench.Question(("w1", "w2"), "writing"),
        mt_bench.Question(("m1", "m2"), "math", ("r1", "r2")),
        mt_bench.Question(("s1",), "stem"),
        mt_bench.Question(("o1",), "other"),
    ]
    rows = mt_bench.ask(Model(), questions, EvalOptions(max_new_tokens=1024))
    first = [(0.0, ["m1"]), (0.1, ["s1"]), (0.7, ["w1", "o1"])]
    assert asked_at == [*first, (0.0, ["m2"]), (0.7, ["w2"])]
    assert [row["answer"] for row in rows] == [
        "to w1", "to m1", "to s1", "to o1", "to w2", "to m2"
    ]  # fmt: skip
    read = answers.read(rows[5])
    assert (read.category, read.references) == ("math", ("r1", "r2"))
    asked_at.clear()
    mt_bench.ask(Model(), questions[:2], EvalOptions(max_new_tokens=1024, temperature=0.5))
    assert {heat for heat, _ in asked_at} == {0.5}
