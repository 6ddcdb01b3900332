"""The packaged twins: as the generator makes them, enough, unlike each other and any evaluation."""

import collections
import importlib.resources
import pathlib
import re

from fedsafe_jax.data import overlap, sources
from fedsafe_jax.demo import demo_set, templates, twins

ROOT = pathlib.Path(__file__).parents[2]
TWINS = twins.build()
HELD_OUT = ("red_team_heldout.jsonl", "benign_heldout.jsonl", "exercises.jsonl")


def prompts(side=None, held_out=None):
    return [
        twin.prompt
        for twin in TWINS
        if side in (None, twin.side) and held_out in (None, templates.is_held_out(twin.unit))
    ]


def evaluation():
    """The prompts that the package is evaluated on."""
    files = demo_set.build()
    asked = [row["messages"][0]["content"] for name in HELD_OUT for row in files[name]]
    opening = re.compile(r"\n\nHuman: (.*)\n\nAssistant: ", re.DOTALL)
    compared = [opening.match(row["text_correct"]) for row in files["hhh_heldout.jsonl"]]
    return asked + [match[1].split("\n\nAssistant: ")[0] for match in compared]


def test_the_packaged_files_are_as_they_are_made():
    folder = importlib.resources.files("fedsafe_jax") / "assets" / "demo"
    for name, rows in twins.files().items():
        text = (folder / name).read_text(encoding="utf-8")
        assert text == twins.text_of(rows), name
        row = f"| `chat:package/{name}` | {len(rows)} |"
        assert row in (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


def test_there_are_enough_of_every_kind():
    harmless, harmful = prompts(twins.HARMLESS), prompts(twins.HARMFUL)
    assert len(harmless) >= 600 and len(harmful) >= 450
    assert len(prompts(twins.HARMLESS, held_out=False)) >= 500
    assert min(len(prompts(side, held_out=True)) for side in twins.SIDES) >= 50
    topics = collections.Counter(t.topic for t in TWINS if t.side == twins.HARMFUL)
    assert topics.keys() == {row["topic"] for row in twins.load_words()["plain"][twins.HARMFUL]}
    asked = [p for p in harmful if p.endswith("?")]
    assert 0.3 < len(asked) / len(harmful) < 0.7  # questions and imperatives


def test_no_request_comes_twice_or_on_both_sides():
    counts = collections.Counter(overlap.normalise(p) for p in prompts())
    assert counts.most_common(1)[0][1] == 1


def test_no_slot_is_left_open():
    assert [p for p in prompts() if re.search(r"[{}#]|  | [.,?]", p)] == []


def test_a_pair_differs_in_its_object_alone():
    """Only the meaning tells sides apart: up to the verb, a pair's texts are the same."""
    words = twins.load_words()
    for entry in words["verbs"]:
        shown = collections.defaultdict(dict)
        for twin in TWINS:
            if twin.unit == entry["verb"]:
                shown[twin.pair][twin.side] = twin.prompt
        pairs = [sides for sides in shown.values() if len(sides) == 2]
        assert pairs, entry["verb"]
        for pair, sides in enumerate(pairs):
            around = {
                text.replace(twins.thing_of(entry[side][pair]), "...")
                for side, text in sides.items()
            }
            assert len(around) == 1 and "..." in around.pop(), sides


def test_nothing_is_near_what_the_package_is_evaluated_on():
    near = overlap.is_near(prompts(), evaluation())
    assert [p for p, bad in zip(prompts(), near, strict=True) if bad] == []


def test_nothing_that_is_trained_on_is_near_what_is_held_out():
    units = {
        part: {t.unit for t in TWINS if templates.is_held_out(t.unit) == part} for part in (0, 1)
    }
    assert units[0].isdisjoint(units[1])
    trained, held_out = prompts(held_out=False), prompts(held_out=True)
    near = overlap.is_near(trained, held_out)
    assert [p for p, bad in zip(trained, near, strict=True) if bad] == []


def test_sources_read_them_as_prompts_without_answers():
    examples = sources.load("chat:package/align_harmless.jsonl", "")
    assert len(examples) == len(prompts(twins.HARMLESS, held_out=False))
    assert {e.response for e in examples} == {""} and {e.label for e in examples} == {"unknown"}
    left = sources.load("chat:package/align_harmful.jsonl#without=drugs", "")
    assert "drugs" not in {e.category for e in left}
