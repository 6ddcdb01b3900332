"""Messages between server and sites: arrays and configs come out as they went in."""

import json

import numpy as np
import pytest

pytest.importorskip("flwr")

from flwr.app import ConfigRecord  # noqa: E402

from fedsafe_jax.config import ConfigError, default_config  # noqa: E402
from fedsafe_jax.flower import wire  # noqa: E402

# What differs between a server's config and the one that a site reads from it.
STAYS = {
    "cai.red_team_sources": ("chat:MARKER.jsonl",),
    "cai.records": ("MARKER.jsonl",),
    "cai.data": "given",
    "cai.few_shot_file": "/MARKER/few_shots.json",
    "eval.judges": ("rules", "chat:MARKER@https://name:FAKE-MARKER@judge.example/v1#compare"),
    "eval.judge_cache": "/MARKER/replies",
    "safe_sources": ("chat:MARKER.jsonl",),
    "data_dir": "/MARKER/data",
    "federated.unaligned": "MARKER",
    "federated.attribution": 16,
    "federated.exclude": (3,),
}


def test_configs_travel_without_what_is_the_servers_alone():
    config = default_config()
    config.seeds, config.filter.action = (3,), "mask"
    config.heldout_sources, config.eval.max_prompts = ("chat:package/filter.jsonl",), 7
    for name, value in STAYS.items():
        wire.set_field(config, name, value)
    record = wire.config_record(config)
    assert "MARKER" not in json.dumps(dict(record))
    wanted = default_config()
    wanted.seeds, wanted.filter.action = (3,), "mask"
    wanted.heldout_sources, wanted.eval.max_prompts = ("chat:package/filter.jsonl",), 7
    wanted.eval.judges = wire.JUDGES_AT_SERVER
    assert json.dumps(wire.config_of(record).to_dict()) == json.dumps(wanted.to_dict())


def test_principles_travel_where_answers_are_revised():
    config = default_config()
    config.cai.constitution, config.filter.action = "principles.json", "rewrite"
    config.cai.refusal_word = " No"
    sent = wire.config_of(wire.config_record(config)).cai
    assert (sent.constitution, sent.refusal_word) == ("principles.json", " Sorry")
    config.filter.action = "turn"
    sent = wire.config_of(wire.config_record(config)).cai
    assert (sent.constitution, sent.refusal_word) == ("package:constitution", " No")


def test_a_federation_is_known_by_everything_but_its_judge():
    def name(**fields):
        config = default_config()
        for field, value in fields.items():
            wire.set_field(config, field.replace("__", "."), value)
        return wire.config_record(config)["federation"]

    assert name() == name() != name(cai__red_team_prompts=3)
    assert name() == name(eval__judges=("chat:m@https://FAKE@judge.example#compare",))


@pytest.mark.parametrize(
    "text",
    [
        "", "not JSON", "[]", "5", "null", "[" * 100_000, '{"rounds": NaN}',
        '{"learning_rate": Infinity}', '{"rounds": 1' + "0" * 30 + "}", '{"rounds": "2"}',
        '{"rounds": [2]}', '{"rounds": null}', '{"filter": 5}', '{"filter": {"a": {"b": 1}}}',
        '{"heldout_sources": [["chat:x.jsonl"]]}', '{"roundz": 1}', '{"": 1}', '{"seeds": [1e400]}',
        '{"rounds": ' + "9" * 5000 + "}",
    ],
)  # fmt: skip
def test_a_config_that_no_server_of_this_package_sends_is_one_line(text):
    with pytest.raises(ConfigError):
        wire.config_of({"config": text})


@pytest.mark.parametrize("record", [{}, {"config": 5}, {"config": b"x"}, {"config": [1, 2]}])
def test_a_question_without_a_config_is_one_line(record):
    with pytest.raises(ConfigError, match="no JSON|expected an object"):
        wire.config_of(record)


def test_a_refusal_is_a_sentence_of_its_code_and_no_text_of_a_site():
    for code, sentence in wire.REFUSALS.items():
        assert list(wire.refused(code)) == ["code"]
        assert sentence in wire.refusal(wire.refused(code))
    for other in ({}, {"code": "FAKE"}, {"code": 5}, {"code": [1.0]}, {"reason": "FAKE"}):
        said = wire.refusal(ConfigRecord(other))
        assert said == "it refused with a code that is not known here"


def test_arrays_travel_by_name():
    tree = {"adapter": {"q": {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}}, "control": ()}
    record = wire.arrays(tree)
    assert list(record) == ["adapter.q.a"]
    unpacked = wire.tree(record, tree)
    np.testing.assert_array_equal(unpacked["adapter"]["q"]["a"], tree["adapter"]["q"]["a"])
    assert unpacked["control"] == ()


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ({}, "array q is missing"),
        ({"q": np.zeros((2, 3), np.float32), "k": np.zeros(1, np.float32)}, "array k is not known"),
        ({"q": np.zeros((2, 4), np.float32)}, r"float32 \[2, 4\], expected float32 \[2, 3\]"),
        ({"q": np.zeros((2, 3), np.float64)}, r"float64 \[2, 3\], expected float32 \[2, 3\]"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_by_name(sent, message):
    with pytest.raises(wire.WireError, match=message):
        wire.tree(wire.arrays(sent), {"q": np.zeros((2, 3), np.float32)})
