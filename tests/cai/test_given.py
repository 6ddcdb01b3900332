"""Ready-made revisions: forms of rows, what is refused, and which rows a round takes."""

import json

import numpy as np
import pytest

from fedsafe_jax.cai import given
from fedsafe_jax.cai.revise import Record
from fedsafe_jax.data.examples import SourceError

# Upstream's four kinds of rows (DeRTa, data/train): helpful, vanilla safety, a harmful prefix, and
# the harmful answer whose tokens turn to a refusal, which is what "safe": "true" means there.
DERTA = [
    {"prefix": "[INST] Name a game. [\\INST]", "text": " Uno.<|end_of_text|>", "safe": "false"},
    {"prefix": "[INST] Do harm. [\\INST]", "text": " I can't.<|end_of_text|>", "safe": "false"},
    {"prefix": "[INST] Do harm. [\\INST] Sure, first", "text": " I can't.</s>", "safe": "false"},
    {"prefix": "[INST] Do harm. [\\INST]", "text": " Sure, first this.", "safe": "true"},
    {"prefix": "[INST] Do worse. [\\INST]", "text": " Sure.", "safe": "true"},
]


def written(folder, rows, name="rows.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return given.read((name,), str(folder))


def texts(record):
    return record.prompt, record.initial, record.revision


def test_records_and_triples_are_read_alike(tmp_path):
    made = Record(
        "How?", "Like so.", 3, critique="Bad.", revision="No.", earlier=((1, "c", "r"),),
        dropped="", preferred=True,
    )  # fmt: skip
    whole = {"arm": "fl+cai", "seed": 0, "round": 2} | made._asdict()
    lost = whole | {"dropped": "cut", "preferred": False}
    bare = {"prompt": "How?", "initial": "Like so.", "revision": "No."}
    first, second, third = written(tmp_path, [whole, lost, bare])
    assert first == made and second.dropped == "cut" and not second.preferred
    assert texts(third) == texts(made) and third.preferred and not third.dropped
    (same,) = written(tmp_path, [bare | {"revision": "Other."}, bare | {"revision": "Like so."}])[
        1:
    ]
    assert same.dropped == "unchanged" and not same.preferred


def test_turns_of_records_are_read_as_those_of_all_data(tmp_path):
    bare = {"prompt": "How?", "initial": "Like so.", "revision": "No."}
    parts = [{"type": "text", "text": "How"}, {"type": "text", "text": "now?"}]
    said = [{"role": "developer", "content": "Be brief."}, {"role": "human", "content": parts}]
    (record,) = written(tmp_path, [bare | {"messages": said}])
    assert record.messages == (("system", "Be brief."), ("user", "How\nnow?"))


def test_rows_of_derta_are_put_together_by_request(tmp_path):
    helpful, mended, alone = written(tmp_path, DERTA)
    assert texts(helpful) == ("Name a game.", "", "Uno.") and not helpful.preferred
    assert texts(mended) == ("Do harm.", "Sure, first this.", "I can't.") and mended.preferred
    assert alone.dropped == given.NO_SAFE_ANSWER
    (prefixed,) = written(
        tmp_path, DERTA[2:3]
    )  # the beginning of the harmful answer is all there is
    assert texts(prefixed) == ("Do harm.", "Sure, first", "I can't.")
    prompt = "### Instruction:\nDo harm.\n\n### Response:"
    (triple,) = written(tmp_path, [{"prefix": prompt, "text": "Sure.", "safe": "I can't."}])
    assert texts(triple) == ("Do harm.", "Sure.", "I can't.") and triple.preferred


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"prompt": "a", "text": "b"},
            r"rows.jsonl line 1: expected \{prompt, initial, revision\}",
        ),
        ({"prompt": "a", "revision": "b"}, "line 1: field 'initial' must be text"),
        ({"prompt": " ", "initial": "x", "revision": "b"}, "line 1: 'prompt' is blank"),
        ({"prompt": "a", "initial": "x", "revision": 3}, "'revision' must be text, not 3"),
        ({"prefix": "", "text": "x", "safe": "b"}, "line 1: 'prefix' is blank"),
        ({"prompt": "a\0", "initial": "x", "revision": "b"}, "'prompt' holds a NUL character"),
        (
            {"prompt": "a", "initial": "x", "revision": "b", "messages": [{"role": "user"}]},
            "line 1: message 1 of 'messages' needs 'role' and 'content'",
        ),
        ({"prompt": "a", "initial": "x", "revision": ""}, "no row has a revision to train on"),
    ],
)
def test_other_rows_are_refused_by_place_and_field(tmp_path, row, said):
    with pytest.raises(SourceError, match=said):
        written(tmp_path, [row])


def test_rounds_take_turns_through_every_row():
    records = [
        Record(str(i), "", 0, critique="", revision="r", earlier=(), dropped="", preferred=False)
        for i in range(10)
    ]

    def slices(seed, count, rounds):
        return [
            [int(r.prompt) for r in given.rows_of_round(records, count, t, generator=of(seed))]
            for t in rounds
        ]

    def of(seed):
        return lambda epoch: np.random.default_rng([seed, epoch])

    taken = sum(slices(0, 4, range(5)), [])
    assert sorted(taken[:10]) == sorted(taken[10:]) == list(range(10))  # 5 x 4 rows: two epochs
    assert slices(0, 4, [3]) == [taken[12:16]]  # of the round alone: a resumed run goes on with it
    assert slices(1, 4, range(5)) != slices(0, 4, range(5))
    assert sorted(slices(0, 99, [7])[0]) == list(range(10))
    # 20,000 rows, 50 rounds of 50 steps of 16: the paper's two epochs, 800 rows a round.
    assert given.rows_a_round(True, steps=50, batch=16, replay=0, pairs=4) == 800
    assert given.rows_a_round(True, steps=50, batch=16, replay=160, pairs=4) == 640
    assert given.rows_a_round(False, steps=50, batch=16, replay=160, pairs=4) == 200
