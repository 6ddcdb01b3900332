"""IFEval: every checker on an answer that follows and one that does not, and its accuracies."""

import json

import numpy as np
import pytest

from fedsafe_jax.data.examples import SourceError
from fedsafe_jax.evals import TASKS, EvalOptions
from fedsafe_jax.evals.instructions import CHECKERS, follows, loosely_follows, sentences
from fedsafe_jax.evals.task import EvalSet
from fedsafe_jax.pipeline import evaluation

# Instruction, arguments, answers that follow, answers that do not.
CASES = [
    ("keywords:existence", {"keywords": ["fox", "hen"]}, ["A Fox saw hens."], ["A fox."]),
    ("keywords:frequency", {"keyword": "hen", "frequency": 2, "relation": "at least"},
     ["hen, Hen"], ["hen"]),
    ("keywords:frequency", {"keyword": "hen", "frequency": 2, "relation": "less than"},
     ["hen"], ["hen hen"]),
    ("keywords:forbidden_words", {"forbidden_words": ["hen"]}, ["hens"], ["A Hen!"]),
    ("keywords:letter_frequency", {"letter": "E", "let_frequency": 2, "let_relation": "at least"},
     ["hEne"], ["hen"]),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"},
     ["One. Two."], ["Dr. One is in."]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"},
     ["one two"], ["it's two"]),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2},
     ["a *** b", "***\na\n***\nb\n***"], ["a", "a *** *** b"]),
    ("length_constraints:nth_paragraph_first_word",
     {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "so"},
     ["a\n\n\"So, b"], ["so\n\na", "a\n\nsome", "a\n\nso\n\nb", "so"]),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[a] [b]"], ["[a b"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["a\np. s. b"], ["a\nps b"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["P.P.S. b"], ["P.S. b"]),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2},
     ["* a\n- b"], ["* a\n** b **", "* a\n* b\n- c"]),
    ("detectable_format:constrained_response", {}, ["Well: My answer is no."], ["No."]),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2},
     ["*a* and *b*"], ["*a* and * *"]),
    ("detectable_format:multiple_sections", {"section_spliter": "Section", "num_sections": 2},
     ["Section 1\na\nSection 2\nb"], ["Section 1\nSection B"]),
    ("detectable_format:json_format", {}, ['```json\n{"a": 1}\n```', "[1]"], ["{a: 1}"]),
    ("detectable_format:title", {}, ["<<a song>>\nb"], ["<< >>", "<a song>"]),
    ("combination:two_responses", {}, ["a\n******\nb"], ["a ****** a", "a ****** ****** b"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi. "}, [" say Hi. Hi"], ["Hi"]),
    ("startend:end_checker", {"end_phrase": "Bye now."}, ['"So. bye now."'], ["Bye now. A"]),
    ("startend:quotation", {}, [' "a" '], ['"a', '"']),
    ("change_case:capital_word_frequency",
     {"capital_frequency": 2, "capital_relation": "at least"}, ["A WELL-KNOWN fox"], ["NO fox"]),
    ("change_case:english_capital", {}, ["A FOX 3."], ["A fox"]),
    ("change_case:english_lowercase", {}, ["a fox."], ["A fox."]),
    ("punctuation:no_comma", {}, ["a; b"], ["a, b"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments", "right", "wrong"), CASES)
def test_checkers(name, arguments, right, wrong):
    assert [follows(name, arguments, answer) for answer in right] == [True] * len(right)
    assert [follows(name, arguments, answer) for answer in wrong] == [False] * len(wrong)
    assert follows(name, arguments, " \n") is False


def test_every_checker_has_a_case():
    assert {name for name, *_ in CASES} == set(CHECKERS)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("no end", 1),
        ("One. Two! Three?", 3),
        ('He said "Go." Then he left...', 2),
        ("Mr. J. Smith pays 3.5 in the U.S. today.", 1),
        ("See e.g. this. And that", 2),
    ],
)
def test_sentences_are_counted(text, count):
    assert sentences(text) == count


def test_loose_answers_lose_first_and_last_line_and_stars():
    ends = {"end_phrase": "the end"}
    answer = "Sure:\nthe **end**\nHope it helps"
    assert not follows("startend:end_checker", ends, answer)
    assert loosely_follows("startend:end_checker", ends, answer)
    assert not loosely_follows("startend:end_checker", ends, "the end\n\n\nof it\nall\nhere")
    assert loosely_follows("language:response_language", {"language": "de"}, "ja") is None


class Says:
    def __init__(self, *answers):
        self.answers = list(answers)

    def answer_dialogues(self, dialogues, **options):
        return self.answers, np.ones(len(dialogues), bool)


def test_accuracies_by_prompt_and_by_instruction(tmp_path):
    comma, small = "punctuation:no_comma", "change_case:english_lowercase"
    rows = [
        {"instruction_id_list": [comma, small], "kwargs": [{}, {"num_words": None}]},
        {"instruction_id_list": [comma], "kwargs": [{}]},
        {"instruction_id_list": [comma, "language:response_language"],
         "kwargs": [{}, {"language": "de"}]},
    ]  # fmt: skip
    lines = [json.dumps(row | {"key": i, "prompt": f"Do {i}."}) for i, row in enumerate(rows)]
    (tmp_path / "i.jsonl").write_text("\n".join(lines))
    sets = {"ifeval": EvalSet(TASKS["ifeval"], "", TASKS["ifeval"].load("i.jsonl", str(tmp_path)))}
    lm = Says("Sure!\nall small", "a, b", "ja")
    outcome = evaluation.evaluate(lm, sets, EvalOptions())
    assert outcome["ifeval"]["strict"] == [[True, False], [False], [True, None]]
    assert outcome["ifeval"]["loose"] == [[True, True], [False], [True, None]]
    summary = evaluation.summarise(sets, [outcome], EvalOptions())["ifeval"]
    assert (summary["prompt_strict"], summary["prompt_loose"]) == (0, 50)
    assert (summary["instruction_strict"], summary["instruction_loose"]) == (50, 75)
    assert (summary["n"], summary["n_instructions"], summary["not_checkable"]) == (2, 4, 1)
    assert summary["by_instruction"][comma] == {"accuracy": pytest.approx(200 / 3), "n": 3}
    assert json.loads(json.dumps(outcome)) == outcome


@pytest.mark.parametrize(
    ("names", "kwargs", "message"),
    [
        (["punctuation:no_coma"], [{}], "no_comma"),
        (["punctuation:no_comma"], [], "lists of the same length"),
        (["punctuation:no_comma"], [{"a": 1}], r"needs the arguments \[\], found \['a'\]"),
        (["keywords:existence"], [{"keywords": ["a", "(b"]}], "do not fit"),
        (["keywords:existence"], ["x"], "must be an object"),
    ],
)
def test_wrong_rows_are_named(tmp_path, names, kwargs, message):
    row = {"prompt": "Do.", "instruction_id_list": names, "kwargs": kwargs}
    (tmp_path / "i.json").write_text(json.dumps([row]))
    with pytest.raises(SourceError, match=f"i.json item 0: .*{message}"):
        TASKS["ifeval"].load("i.json", str(tmp_path))
