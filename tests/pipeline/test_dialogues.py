"""Whole dialogues in a run: asked, probed, revised, kept in records and shown."""

import json
import types

import numpy as np
from commands import NO_ANSWERS, rows, run

from fedsafe_jax.cai import constitution, revise
from fedsafe_jax.config import default_config
from fedsafe_jax.data import chat
from fedsafe_jax.data.examples import Example
from fedsafe_jax.evals import judges
from fedsafe_jax.filters.pairs import drop_mislabelled, hard_negatives
from fedsafe_jax.pipeline import constitutional, new_answers
from fedsafe_jax.pipeline.refusal_probe import Probe
from fedsafe_jax.runtime.progress import PhaseTimer

LAST = ("user", "How long does it take?")
KNOT = (("system", "Be brief."), ("user", "I tie a knot."), ("assistant", "Good."), LAST)
BREAD = (("system", "Be brief."), ("user", "I bake bread."), ("assistant", "Good."), LAST)


def stage_of(packaged, red_team, **fields):
    """Constitutional AI of a run that has a red team and no more."""
    config = default_config()
    config.cai.update(fields)
    inputs = types.SimpleNamespace(lm=packaged, red_team=red_team, given=[])
    return constitutional.ConstitutionalStage(
        config, inputs, packaged.model, clients=None, own=None, folder=None, mine=bool, seed=0
    )


def test_a_flagged_answer_is_rewritten_in_its_dialogue(monkeypatch):
    threads = []

    class Session:
        def __init__(self, lm):
            del lm

        def answer_dialogues(self, dialogues, max_new_tokens, truncate):
            threads.append([tuple(turns) for turns in dialogues])
            return ["I'm sorry, but no."] * len(dialogues), np.ones(len(dialogues), bool)

    monkeypatch.setattr(new_answers, "ChatSession", Session)
    pairs = [Example(turns, "Sure, here it is.", "unsafe") for turns in (KNOT, BREAD, (LAST,))]
    principles = constitution.load("package:constitution")
    answers = new_answers.revise_answers(
        None, principles, pairs, max_new_tokens=8, seed=0, refuses=judges.refuses("start")
    )
    assert answers == ["I'm sorry, but no."] * 3
    for asked in threads:  # the critique, then the revision
        for turns, pair in zip(asked, pairs, strict=True):
            answered = (*pair.messages, ("assistant", "Sure, here it is."))
            assert turns[: len(answered)] == answered


def test_what_is_left_of_labelled_pairs_keeps_all_turns():
    pairs = [
        Example(KNOT, "Sure, here.", "unsafe"),
        Example(BREAD, "I'm sorry, but no.", "unsafe"),
        Example(BREAD, "I'm sorry, no.", "safe"),
    ]
    kept, disputed = drop_mislabelled(pairs, judges.refuses("start"))
    assert kept == [pairs[0], pairs[2]] and disputed == 1
    (twin,) = hard_negatives(kept, 1.0, 0, judges.refuses("start"))
    assert twin.messages == KNOT and twin.response == "I'm sorry, no."


def test_a_probe_asks_dialogues():
    asked = []

    class Model:
        def answer_dialogues(self, dialogues, max_new_tokens, truncate):
            asked.extend(dialogues)
            return ["I'm sorry, no."] * len(dialogues), np.ones(len(dialogues), bool)

    probe = Probe(
        [KNOT, BREAD],
        lambda refused, high: int(refused < 100),
        len,
        PhaseTimer(),
        refuses=judges.refuses("start"),
    )
    assert probe(Model()) == 0
    assert asked == [KNOT, BREAD]


def test_probed_dialogues_are_not_trained_on_and_those_that_end_alike_are(packaged):
    red_team = [Example(KNOT, ""), Example(BREAD, ""), Example(BREAD, "")]
    stage = stage_of(packaged, red_team, schedule="adaptive", probe_prompts=1)
    (probed,) = stage.probe_prompts
    left = {example.messages for example in stage.red_team}
    assert left == {KNOT, BREAD} - {probed}


def test_triples_and_imitation_keep_the_dialogue(packaged, monkeypatch):
    record = revise.Record(
        LAST[1], "Sure.", 0, critique="c", revision="I'm sorry.", earlier=(), dropped="",
        preferred=True, messages=KNOT,
    )  # fmt: skip
    stage = stage_of(packaged, [Example(KNOT, "")])
    alone = record._replace(messages=())
    assert [t.turns for t in stage.rows.triples([record, alone])] == [KNOT, (LAST,)]
    old = (("user", "old words " * 100), ("assistant", "Good."))
    long = record._replace(messages=(KNOT[0], *old, *KNOT[1:]))
    (triple,) = stage.rows.triples([long])
    assert triple.turns == KNOT  # the oldest turns make room for the answers
    replay = [Example(long.messages, "An hour."), Example((("user", "Lost?"),), "Yes.")]
    encode = chat.encode
    monkeypatch.setattr(  # a request that leaves no room for its answer
        chat, "encode", lambda words, turns, *rest: encode(words, turns, *rest)
        if turns[-1][1] != "Lost?" else None,
    )  # fmt: skip
    (revised, replayed), first, lost, notes = stage.rows.imitation([long], replay)
    assert (first, lost) == (1, 1) and notes == {"cut": 2}  # the lost one is not counted again
    for encoded, answer in ((revised, "An hour."), (replayed, "I'm sorry.")):
        text = packaged.tokenizer.decode(encoded.ids)
        assert "Be brief." in text and "I tie a knot." in text and answer in text
        assert "old words" not in text


def test_a_run_red_teams_with_dialogues_and_reads_its_records_again(tmp_path):
    shared = [{"role": role, "content": text} for role, text in KNOT]
    bread = [{"role": role, "content": text} for role, text in BREAD]
    data = tmp_path / "red.jsonl"
    data.write_text("".join(json.dumps({"messages": m}) + "\n" for m in (shared, bread)))
    workdir = tmp_path / "run"
    settings = (
        "arms=('fl+cai',)", f"cai.red_team_sources=('chat:{data}',)", "cai.data=mixed",
        "cai.check=none", "cai.red_team_prompts=2", "seq_len=128",
    )  # fmt: skip
    run(workdir, *settings, NO_ANSWERS, "rounds=2")
    records = [json.loads(line) for line in (workdir / "cai/round_000.jsonl").open()]
    kept = [r["messages"] for r in records if "messages" in r]
    assert sorted(map(str, kept)) == sorted(map(str, (shared, bread)))
    assert all(r["prompt"] == LAST[1] for r in records if "messages" in r)
    assert rows(workdir)[1]["cai"]["reused"] == len(records)
    assert [revise.from_row(r).turns for r in records if "messages" in r][0] in (KNOT, BREAD)
    preferred = [r for r in records if r["preferred"] and "messages" in r]
    report = (workdir / "report.html").read_text()
    assert not preferred or "I tie a knot." in report or "I bake bread." in report
