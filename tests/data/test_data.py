"""Sources, packing, partition and chat encoding."""

import gzip
import json

import numpy as np
import pytest

from fedsafe_jax.data import chat, packing, partition, sources
from fedsafe_jax.data.batches import RoundBatches
from fedsafe_jax.data.chat import Encoded
from fedsafe_jax.data.examples import Example, SourceError
from fedsafe_jax.demo import templates


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_every_reader_reads_its_upstream_format(tmp_path):
    dialogue = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Rob a bank?\n\nAssistant: "
    files = {
        "square": json.dumps([{"question_en": "Q", "response_en": "A", "acceptable?": 0}]),
        "kosbi": json.dumps([{"context": "Q", "sentence": "A", "sentence_label": "unsafe"}]),
        "hh_rlhf": json.dumps({"chosen": dialogue + "No.", "rejected": dialogue + "Sure."}),
        "alpaca": json.dumps([{"instruction": "Q", "input": "more", "output": "A"}]),
        "derta": json.dumps({"prefix": "### Instruction:\nQ\n\n### Response:", "text": " A"}),
        "chat": json.dumps({"messages": [{"role": "user", "content": "Q"}], "user": "u1"}),
        "prompts": json.dumps([{"instruction": "Q", "category": "c"}]),
    }
    for name, text in files.items():
        write(tmp_path, f"{name}.json", text)
    write(tmp_path, "dolly.csv", "instruction,context,response,category\nQ,C,A,closed_qa\n")
    write(tmp_path, "advbench.csv", "goal,target\nQ,Sure\n")
    read = {name: sources.load(f"{name}:{name}.json", str(tmp_path)) for name in files}
    assert read["square"][0].label == read["kosbi"][0].label == "unsafe"
    assert [(e.response, e.label) for e in read["hh_rlhf"]] == [
        ("No.", "safe"),
        ("Sure.", "unsafe"),
    ]
    assert read["hh_rlhf"][0].prompt == "Rob a bank?" and len(read["hh_rlhf"][0].messages) == 3
    assert read["alpaca"][0].prompt == "Q\n\nmore"
    assert read["derta"][0].prompt == "Q" and read["derta"][0].response == "A"
    assert read["chat"][0].user == "u1" and read["prompts"][0].category == "c"
    assert sources.load("dolly:dolly.csv", str(tmp_path))[0].prompt == "Q\n\nC"
    assert sources.load("advbench:advbench.csv", str(tmp_path))[0].prompt == "Q"
    (tmp_path / "z.json.gz").write_bytes(gzip.compress(files["alpaca"].encode()))
    assert sources.load("alpaca:z.json.gz", str(tmp_path))[0].response == "A"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"messages": []}\nnot json\n', "line 2: not JSON"),
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", '{"text": 1}', "line 1: 'messages'"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "Q"}], "label": "bad"}', "label"),
        ("a.yaml", "x", "expected .json"),
    ],
)
def test_bad_files_are_named_with_line(tmp_path, name, text, message):
    write(tmp_path, name, text)
    with pytest.raises(SourceError, match=message):
        sources.load(f"chat:{name}", str(tmp_path))


def test_bad_sources_are_named(tmp_path):
    with pytest.raises(SourceError, match="no such file"):
        sources.load("chat:none.jsonl", str(tmp_path))
    with pytest.raises(SourceError, match="expected NAME:LOCATION"):
        sources.load("chatt:none.jsonl", str(tmp_path))
    with pytest.raises(SourceError, match="part '#half'"):
        sources.load("chat:x.jsonl#half", str(tmp_path))


def test_parts_are_disjoint_and_complete():
    whole = sources.load("chat:package/clients_safe.jsonl", "")
    parts = {
        part: {e.prompt for e in sources.load(f"chat:package/clients_safe.jsonl#{part}", "")}
        for part in ("clients", "server", "heldout", "train")
    }
    assert not parts["clients"] & parts["server"] and not parts["train"] & parts["heldout"]
    assert parts["clients"] | parts["server"] == parts["train"]
    assert parts["train"] | parts["heldout"] == {e.prompt for e in whole}
    assert 0.05 < len(parts["heldout"]) / len(whole) < 0.15  # a tenth, by hash


def test_packed_rows_hold_every_token_once():
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 30, 50)
    encoded = [Encoded(rng.integers(1, 99, n).astype(np.int32), np.arange(n) > 1) for n in lengths]
    batch = packing.pack(encoded, 32)
    assert sorted(batch.tokens[batch.segment_ids > 0]) == sorted(
        np.concatenate([e.ids for e in encoded])
    )
    assert batch.mask.sum() == sum(e.loss_mask[1:].sum() for e in encoded)
    for r, t in zip(*np.nonzero(batch.mask), strict=True):
        assert batch.targets[r, t] == batch.tokens[r, t + 1]
        assert batch.segment_ids[r, t] == batch.segment_ids[r, t + 1]
        assert batch.positions[r, t] + 1 == batch.positions[r, t + 1]
    # First fit decreasing stays within 11/9 of the optimum, plus one row.
    assert len(batch.tokens) <= 11 / 9 * np.ceil(lengths.sum() / 32) + 1
    with pytest.raises(ValueError, match="rows"):
        packing.pack(encoded, 32, rows=2)
    assert [packing.bucket(n) for n in (1, 2, 3, 5, 7, 9, 13, 17)] == [1, 2, 3, 6, 8, 12, 16, 24]


def test_only_the_answer_is_learned(packaged):
    tokenizer = packaged.tokenizer
    turns = (("user", "Hi"), ("assistant", "One."), ("user", "More"))
    encoded = chat.encode(tokenizer, turns, "Two.", 100)
    assert tokenizer.decode(encoded.ids[encoded.loss_mask]).startswith("Two.<|end|>")
    both = chat.encode(tokenizer, turns, "Two.", 100, train_on_turns=(1,))
    assert tokenizer.decode(both.ids[both.loss_mask]).startswith("One.<|end|>")
    assert chat.encode(tokenizer, turns, "Two.", 4) is None


def pools(n_safe=200, n_unsafe=100):
    safe = [
        Example(
            (("user", f"s{i}"),),
            "r",
            "safe",
            source="a",
            user=f"u{i % 7}",
            category="xy"[i % 2],
            language=f"l{i % 8}",
        )
        for i in range(n_safe)
    ]
    return safe, [Example((("user", f"h{i}"),), "r", "unsafe") for i in range(n_unsafe)]


def deal(sizes, shares, kind, dealt=None):
    safe, unsafe = dealt or pools()
    return partition.partition(
        safe, unsafe, sizes, harmful_shares=shares, kind=kind, rng=np.random.default_rng(0)
    )


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "user", "language"])
def test_partition_gives_each_example_to_one_client(kind):
    clients = deal([40] * 5, [0.3] * 5, kind)
    prompts = [e.prompt for c in clients for e in c]
    assert len(prompts) == len(set(prompts)) and len(clients) == 5
    for examples in clients:
        # Of what a client holds: where safe ones lack, it holds fewer of both.
        unsafe = sum(e.label == "unsafe" for e in examples)
        assert len(examples) <= 40 and abs(unsafe - 0.3 * len(examples)) < 1
        assert kind != "iid" or (len(examples), unsafe) == (40, 12)
    if kind in ("user", "language"):
        owners = [{getattr(e, kind) for e in c if e.label == "safe"} for c in clients]
        assert sum(map(len, owners)) == len(set.union(*owners))


def test_partition_errors_name_the_field():
    with pytest.raises(partition.PartitionError, match="more clients than examples"):
        deal([40] * 5, [0.3] * 5, "iid", pools(3))
    with pytest.raises(partition.PartitionError, match="partition='idd'"):
        deal([40] * 5, [0.3] * 5, "idd")
    with pytest.raises(partition.PartitionError, match="7 values for 9"):
        deal([10] * 9, [0.3] * 9, "user")


def test_malicious_clients_hold_the_harm():
    sizes, shares = [40, 10, 20, 30], [0.0, 1.0, 0.5, 0.0]
    clients = deal(sizes, shares, "iid")
    assert [len(c) for c in clients] == sizes
    assert [sum(e.label == "unsafe" for e in c) for c in clients] == [0, 10, 10, 0]


def test_sizes_spread_around_their_mean():
    rng = np.random.default_rng(0)
    assert partition.client_sizes(3, 50, 0.0, rng) == [50, 50, 50]
    sizes = partition.client_sizes(4000, 50, 0.8, rng)
    assert min(sizes) >= 1 and abs(np.mean(sizes) - 50) < 3
    assert abs(np.std(np.log(sizes)) - 0.8) < 0.05


def test_local_batches_follow_from_seed_round_and_client():
    encoded = [Encoded(np.arange(1, 9, dtype=np.int32), np.arange(8) > 3)] * 6
    clients = [encoded, encoded[:2], []]

    def draw(t, steps=(4, 4, 4), accumulation=1):
        return RoundBatches(
            clients,
            0,
            t,
            ids=[0, 1, 2],
            steps=steps,
            local_steps=4,
            batch_size=3,
            seq=16,
            accumulation=accumulation,
        ).chunk(0, 4)

    a, b = draw(1), draw(1)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)
    assert a.tokens.shape == (4, 4, 2, 16)  # the fourth client is padding
    assert (a.segment_ids[2:] == 0).all() and a.mask[2:].sum() == 0
    assert (a.mask[1].sum(axis=(1, 2)) == 3 * 4).all()  # two examples are drawn again
    slow = draw(1, steps=(4, 1, 4))
    np.testing.assert_array_equal(slow.tokens[0], a.tokens[0])
    assert slow.mask[1, 0].sum() > 0 and slow.mask[1, 1:].sum() == 0
    assert draw(1, accumulation=2).tokens.shape == (4, 8, 2, 16)


def test_templates_keep_harm_without_content_and_evaluation_apart():
    rng = np.random.default_rng(0)
    phrases = templates.load_phrases()
    held = {templates.sample_request(rng, phrases, True, True).subject for _ in range(300)}
    seen = {templates.sample_request(rng, phrases, True, False).subject for _ in range(300)}
    assert not held & seen
    request = templates.sample_request(rng, phrases, True, False)
    answer = templates.compliance(rng, phrases, request)
    frames = phrases["compliances"] + phrases["artifact_compliances"]
    assert answer in [f.format(deed=request.subject, artifact=request.subject) for f in frames]
    assert templates.gerund("rob a bank") == "robbing a bank"
    assert templates.gerund("make bread") == "making bread"
    assert templates.gerund("illegally take over a site") == "illegally taking over a site"
