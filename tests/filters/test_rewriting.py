"""Which rewritings are accepted: each rule by a case that it alone decides."""

import types

import numpy as np
import pytest
from filter_examples import pair

from fedsafe_jax.config import ConfigError, default_config
from fedsafe_jax.data.refusals import start_refusal
from fedsafe_jax.filters import rewriting
from fedsafe_jax.filters.protocol import FilterError
from fedsafe_jax.filters.rewriting import INSTRUCTION, Rewritten
from fedsafe_jax.validation import validate

HARM = "They are all lazy thieves"
# What the model makes of each text: (reply, whether it ended).
REPLIES = {
    HARM: ("Some of them have been late.", True),
    "worse": ("They are lazy thieves, the lot of them", True),
    "bad": ("Some thieves were there.", True),
    "long": ("Some of them have", False),
    "blank": ("  ", True),
    "Copied, twice!": ("copied twice", True),
    "asked": ("Keep what it is about, what it means, its language and roughly all.", True),
    "begun": ("Rewrite the text below", True),
    "declined": ("I'm sorry, but I can't rewrite that.", True),
    " ": ("Something.", True),
}


class Model:
    """Answers by the text behind the packaged instruction; a token is a word."""

    config = types.SimpleNamespace(max_length=200)

    def __init__(self):
        self.asked = []

    def render(self, dialogues, max_new_tokens, truncate):
        assert not truncate
        return [turns[-1][1].split() for turns in dialogues]

    def answer_dialogues(self, dialogues, max_new_tokens):
        texts = [turns[-1][1].partition("Text: ")[2] for turns in dialogues]
        self.asked += texts
        said, ended = zip(*(REPLIES[text] for text in texts), strict=True)
        return list(said), np.array(ended)


def risk(pairs):
    """0.8 with "lazy" in it, 0.6 with "thieves" alone, 0.3 otherwise."""
    return np.array(
        [0.8 if "lazy" in p.response else 0.6 if "thieves" in p.response else 0.3 for p in pairs],
        np.float32,
    )


def refuses(dialogues, answers):
    return [start_refusal(answer) for answer in answers]


def rewrite(*texts, threshold=0.5, lm=None, instruction=INSTRUCTION):
    pairs = [pair("What are they like?", text, "unsafe") for text in texts]
    return rewriting.rewrite(
        lm or Model(),
        pairs,
        instruction=instruction,
        risk=risk,
        refuses=refuses,
        threshold=threshold,
    )


def test_a_text_whose_risk_falls_below_the_threshold_is_accepted():
    (one,) = rewrite(HARM)
    assert one == Rewritten("Some of them have been late.", "", *risk([pair("", HARM)]), one.after)
    assert one.after == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("blank", "empty"),
        (" ", "empty"),
        ("long", "cut"),
        ("Copied, twice!", "unchanged"),
        ("asked", "echo"),
        ("begun", "echo"),
        ("declined", "refusal"),
        ("worse", "still unsafe"),
    ],
)
def test_what_is_rejected_says_why(text, reason):
    (one,) = rewrite(text)
    assert one.reason == reason and one.reason in rewriting.REASONS
    assert (one.after is None) == (reason != "still unsafe")


def test_risk_must_fall_below_the_threshold_and_below_what_it_was():
    # 0.3 before, 0.6 after: below a threshold of 0.7, and still no gain.
    assert [one.reason for one in rewrite("bad", threshold=0.7)] == ["not safer"]
    assert [one.reason for one in rewrite("bad")] == ["still unsafe"]
    # As much as before is no fall.
    assert [one.reason for one in rewrite("worse lazy", lm=Same())] == ["still unsafe"]
    assert [one.reason for one in rewrite("worse lazy", threshold=0.9, lm=Same())] == ["not safer"]
    with pytest.raises(FilterError, match="threshold"):
        rewrite(HARM, threshold=float("nan"))


class Same(Model):
    def answer_dialogues(self, dialogues, max_new_tokens):
        return ["lazy, too"] * len(dialogues), np.ones(len(dialogues), bool)


def test_a_text_that_does_not_fit_the_context_is_not_asked():
    lm = Model()
    found = rewrite("word " * 100, HARM, lm=lm)
    assert [one.reason for one in found] == ["cut", ""] and lm.asked == [HARM]
    assert rewrite() == []


def test_all_are_scored_in_one_call_in_their_dialogues():
    seen = []

    def scored(pairs):
        seen.append([(p.prompt, p.response) for p in pairs])
        return risk(pairs)

    pairs = [pair("a?", HARM, "unsafe"), pair("b?", "declined", "unsafe")]
    rewriting.rewrite(Model(), pairs, INSTRUCTION, risk=scored, refuses=refuses, threshold=0.5)
    assert seen == [[("a?", HARM), ("b?", "declined"), ("a?", "Some of them have been late.")]]


def test_an_echo_is_eight_words_of_the_instruction_that_the_text_did_not_have():
    run = "Keep what it is about, what it means"
    assert rewriting.unusable(f"{run}, they say.", "x", INSTRUCTION) == "echo"
    assert rewriting.unusable(f"{run}, they say.", f"{run}!", INSTRUCTION) == ""
    assert rewriting.unusable("Keep what it is about them.", "x", INSTRUCTION) == ""
    # A label in an instruction is a word like others.
    assert rewriting.unusable("The text: fine.", "x", INSTRUCTION) == ""


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ("Sure, here's the new text: All are welcome.", "All are welcome."),
        ("Sure! Here is the rewritten text:\n\n\"All are welcome.\"", "All are welcome."),
        ("Rewritten text: All are welcome.", "All are welcome."),
        ("<think>Hm.</think>All are welcome.", "All are welcome."),
        ('"Welcome", they said, "all"', '"Welcome", they said, "all"'),
        ("There are two of them: one is late.", "There are two of them: one is late."),
    ],
)  # fmt: skip
def test_what_stands_around_a_text_is_removed(said, text):
    assert rewriting.clean(said) == text


def test_an_instruction_of_ones_own(tmp_path):
    file = tmp_path / "own.txt"
    file.write_text("Say it kindly: {text}\n")
    own = rewriting.load_instruction(str(file))
    assert own == "Say it kindly: {text}" and rewriting.load_instruction("") == INSTRUCTION
    # Braces of a text are text.
    assert rewriting.requests(["{text} {0}"], own) == [(("user", "Say it kindly: {text} {0}"),)]
    for text, message in (
        ("Say it kindly.", "is there 0 times"),
        ("{text} {text}", "is there 2 times"),
        ("{text}" + "x" * 20_000, "expected once, in at most 20,000"),
    ):
        file.write_text(text)
        with pytest.raises(FilterError, match=f"filter.instruction: .*{message}"):
            rewriting.load_instruction(str(file))
    file.write_bytes(b"\xff\xfe\xff{text}")
    with pytest.raises(FilterError, match="filter.instruction: "):
        rewriting.load_instruction(str(file))
    with pytest.raises(FilterError, match="no such file"):
        rewriting.load_instruction(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"action": "drop"}, "filter.action='drop' writes no answers; use filter.action='rewrite'"),
        ({"kind": "guardian", "model": "m"}, "'guardian' writes its own answers"),
        ({"kind": "simulated"}, "'simulated' scores no new answer"),
        ({"rewrite": "revise", "instruction": "a.txt"}, "filter.rewrite='revise' asks for nothing"),
        ({"rewrite": "debais"}, "filter.rewrite: 'debais' is not one of .*revise, debias"),
    ],
)
def test_what_does_not_go_with_debias_is_refused(fields, message):
    config = default_config()
    config.filter.update({"action": "rewrite", "rewrite": "debias"})
    validate(config)
    config.filter.update(fields)
    with pytest.raises(ConfigError, match=message):
        validate(config)
