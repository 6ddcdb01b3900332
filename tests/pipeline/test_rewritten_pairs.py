"""Clients' flagged pairs under `filter.rewrite`: what is trained on, counted and kept in files."""

import dataclasses
import types

import numpy as np
import pytest

from fedsafe_jax.cai import constitution
from fedsafe_jax.config import default_config
from fedsafe_jax.data.examples import SAFE, UNSAFE, Example
from fedsafe_jax.evals import judges
from fedsafe_jax.filters import rewriting
from fedsafe_jax.filters.actions import FilterCounts
from fedsafe_jax.inference.language_model import LanguageModel
from fedsafe_jax.pipeline import filtering, new_answers, read_files
from fedsafe_jax.pipeline.clients import Clients
from fedsafe_jax.pipeline.filtering import Verdicts
from fedsafe_jax.report import safety_filter

REPLIES = {"insult": "A kind word.", "threat": "I'm sorry, but no.", "slur": "A slur, again."}


def pair(response, label=UNSAFE):
    return Example((("user", "Say it."),), response, label)


CLIENTS = [[pair("fine", SAFE), pair("insult"), pair("threat")], [pair("slur")], []]
P = np.array([0.1, 0.9, 0.9, 0.9], np.float32)


class Base(LanguageModel):
    """The base model: it knows what to make of each text."""

    def render(self, dialogues, max_new_tokens, truncate):
        return [[0]] * len(dialogues)

    def answer_dialogues(self, dialogues, max_new_tokens, truncate=False):
        assert self.adapter is None and max_new_tokens == 48
        texts = [turns[-1][1].removeprefix("Kindly: ") for turns in dialogues]
        return [REPLIES[text] for text in texts], np.ones(len(texts), bool)


class Filter:
    """Flags what has a harmful word."""

    def score(self, pairs):
        said = [any(word in p.response for word in ("insult", "threat", "slur")) for p in pairs]
        return np.where(said, 0.9, 0.2).astype(np.float32)


@pytest.fixture
def inputs():
    config = types.SimpleNamespace(max_length=128, mesh=None)
    base = Base(config, params={}, tokenizer=None, hf_config={}, adapter="an adapter")
    return types.SimpleNamespace(lm=base, constitution=constitution.load("package:constitution"))


@pytest.fixture
def config(tmp_path):
    (tmp_path / "own.txt").write_text("Kindly: {text}")
    config = default_config()
    config.filter.action, config.filter.rewrite = "rewrite", "debias"
    config.filter.instruction = str(tmp_path / "own.txt")
    return config


def test_what_is_rewritten_is_trained_on_and_the_rest_is_dropped_by_reason(config, inputs):
    verdicts = Verdicts(P, 0.5, make_filter=Filter)
    left = filtering.apply_action(config, inputs, CLIENTS, verdicts, seed=0)
    assert [[e.response for e in own.examples] for own in left] == [
        ["fine", "A kind word."],
        [],
        [],
    ]
    assert [own.counts.rewritten for own in left] == [1, 0, 0]
    assert [own.counts.dropped for own in left] == [1, 1, 0]
    rejected = [own.rejected for own in left]
    assert rejected == [{"refusal": 1}, {"still unsafe": 1}, {}]
    assert filtering.describe_rejected(rejected).endswith("not taken: 1 refusal, 1 still unsafe")
    members = Clients(None, counts=[own.counts for own in left], rejected=rejected)
    # A round's line counts its own clients; the whole run's is in the results.
    assert members.filtered_of([1, 2])["rejected"] == {"still unsafe": 1}
    assert "rejected" not in members.filtered_of([2])
    table = safety_filter._rejected([{"rejected": {"refusal": 2}}, {}, {"rejected": {"cut": 3}}])
    assert table.rows == [("cut", "", 3), ("refusal", "", 2)]


def test_revise_is_what_it_was(config, inputs, monkeypatch):
    """By the revisions themselves, with no trace of the other way in counts and scores."""

    class Session:
        def __init__(self, lm):
            assert lm.adapter is None

        def answer_dialogues(self, dialogues, max_new_tokens, truncate):
            said = [
                "I'm sorry, but no." if ("assistant", "threat") in turns else "Done."
                for turns in dialogues
            ]
            return said, np.ones(len(said), bool)

    monkeypatch.setattr(new_answers, "ChatSession", Session)
    monkeypatch.setattr(rewriting, "rewrite", None)
    config.filter.rewrite, config.filter.instruction = "revise", ""
    verdicts = Verdicts(P, 0.5, make_filter=None)
    left = filtering.apply_action(config, inputs, CLIENTS, verdicts, seed=0)
    revised = new_answers.revise_answers(
        dataclasses.replace(inputs.lm, adapter=None),
        inputs.constitution,
        CLIENTS[0][1:],
        max_new_tokens=48,
        seed=0,
        refuses=judges.refuses("start"),
    )
    assert revised == ["", "I'm sorry, but no."]
    assert left[0].examples == [CLIENTS[0][0], CLIENTS[0][2]._replace(response=revised[1])]
    assert left[0].weights.tolist() == [1, 1] and [own.rejected for own in left] == [{}, {}, {}]
    fields = ("dropped", "rewritten")
    assert [[getattr(own.counts, f) for f in fields] for own in left] == [[1, 1], [1, 0], [0, 0]]
    members = Clients(None, counts=[own.counts for own in left], rejected=[{}, {}, {}])
    assert members.filtered_of([0]).keys() == set(FilterCounts._fields)
    assert filtering.describe_rejected([{}, {}]) == ""


def test_scores_that_are_kept_are_those_of_the_filter_alone(config, inputs):
    inputs.filter_pairs = [pair("fine", SAFE)]
    name = filtering._fingerprint(config, inputs, 0)
    assert name == filtering._fingerprint(default_config(), inputs, 0)
    # As an earlier version named them, which had neither field.
    for field in ("rewrite", "instruction"):
        del config.filter[field]
    assert name == filtering._fingerprint(config, inputs, 0)


def test_an_instruction_of_ones_own_is_among_the_files_of_the_run(config, tmp_path):
    config.arms = ("base", "fl+filter")
    assert read_files.files_of(config)["filter.instruction"] == tmp_path / "own.txt"
