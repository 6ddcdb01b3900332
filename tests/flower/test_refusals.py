"""What a site replies when something is wrong there: a code, and no text of its files."""

import json

import pytest

pytest.importorskip("flwr")

from flwr.app import ConfigRecord, Context, Message, RecordDict  # noqa: E402
from flwr.common.serde import message_to_proto  # noqa: E402
from test_flower import node_config, run_config  # noqa: E402

from fedsafe_jax.config import ConfigError  # noqa: E402
from fedsafe_jax.flower import client, server, wire  # noqa: E402
from fedsafe_jax.flower.refusals import CODES, code_of  # noqa: E402
from fedsafe_jax.validation import input_errors  # noqa: E402

MARKER = "FAKE-PRIVATE-TEXT-of-Jane-Doe"


@pytest.fixture
def private(folder, tmp_path):
    """Settings of a site of which every file and folder holds the marker."""
    data = tmp_path / MARKER
    data.mkdir()
    pair = (
        {"role": "user", "content": f"Who is {MARKER}?"},
        {"role": "assistant", "content": MARKER},
    )
    pairs = (folder / "site0.jsonl").read_text() + json.dumps({"messages": pair}) + "\n"
    (data / "site0.jsonl").write_text(pairs)
    (data / "broken.jsonl").write_text(pairs + f'{{"{MARKER}": \n')
    (data / "secret.json").write_text(json.dumps({MARKER: MARKER}))
    (data / "filter.json").write_text(json.dumps({"kind": MARKER}))
    return node_config(folder, 0) | {"data-dir": str(data), "workdir": str(data / "work")}


def question(*overrides, **fields):
    record = wire.config_record(server.read_config(run_config("unused", *overrides)))
    config = json.loads(record["config"])
    for name, value in fields.items():
        section, _, last = name.rpartition("__")
        (config[section] if section else config)[last] = value
    return dict(record) | {"config": json.dumps(config), "round": 0, "steps": 3}


def answer(settings, asked, kind="query"):
    """Returns the reply of the site's app, and all bytes that travel."""
    content = RecordDict({"question": ConfigRecord(asked)} if asked is not None else {})
    message = Message(content, dst_node_id=1, message_type=kind, ttl=60.0)
    reply = client.app(message, Context(1, 1, settings, RecordDict(), {}))
    assert not reply.has_error()
    sent = message_to_proto(reply).SerializeToString()
    return reply.content, sent + repr(reply.content).encode()


def wrong_things(private):
    """Yields `(code, settings, question)` of what may be wrong at a site."""
    data = private["data-dir"]
    yield "data", private | {"sources": "chat:broken.jsonl"}, question()
    yield "data", private | {"sources": "chat:absent.jsonl"}, question()
    yield "data", private | {"sources": "chat:secret.json"}, question()
    yield "data", private | {"sources": f"{MARKER}:pairs.jsonl"}, question()
    yield "filter", private | {"filter": data}, question()
    yield (
        "filter",
        private | {"require-filter": True},
        question("arms=('base','fl')", "export_arm=fl"),
    )
    yield "model", private | {"model": data}, question()
    yield "model", private | {"model": f"{data}/{MARKER}"}, question()
    yield "settings", {"client": 0, MARKER: MARKER}, question()
    yield "settings", private | {"client": 3}, question()
    yield "settings", private | {"sources": 5.0}, question()
    for source in (f"chat:{data}/secret.json", "chat:secret.json", "chat:../secret.json"):
        yield "policy", private, question(filter__sources=[source])
        yield "policy", private, question(heldout_sources=[source])
        yield "policy", private, question(eval__tasks=[f"hhh={source}"])
    for field in ("model", "chat_template", "filter__load", "filter__encoder", "filter__model"):
        yield "policy", private, question(**{field: f"{data}/secret.json"})
    yield "policy", private, question(cai__constitution=f"{data}/secret.json")
    yield "policy", private, question(filter__judge="chat:m@http://169.254.169.254/latest#compare")
    yield "config", private, question(rounds=0)
    yield "config", private, question(roundz=1)
    yield "config", private, question(rounds=10**30)
    yield "config", private, question(learning_rate=float("nan"))
    yield "config", private, question(seeds=[0, 1])
    for text in ("", "not JSON", "[]", "[" * 100_000):
        yield "config", private, question() | {"config": text}
    for broken in (None, {}, question() | {"config": 5}, {"config": "{}"}):
        yield "message", private, broken


def test_no_reply_holds_a_text_of_the_site(private, capfd):
    checked = 0
    for code, settings, asked in wrong_things(private):
        content, sent = answer(settings, asked)
        assert dict(content.config_records["refused"]) == {"code": code}, capfd.readouterr().err
        assert MARKER.encode() not in sent and b"Traceback" not in sent
        assert f"sent to the server as code {code}: " in capfd.readouterr().err
        checked += 1
    assert checked > 35


class Panic(BaseException):
    """As of a library in Rust: no `Exception`."""


def every_error():
    known = {
        *input_errors(), *CODES, ConfigError, wire.WireError, RuntimeError, ValueError, KeyError,
        MemoryError, RecursionError, UnicodeError, AssertionError, Panic,
    }  # fmt: skip
    return sorted(known, key=lambda kind: kind.__name__)


@pytest.mark.parametrize("kind", every_error(), ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("method", ["describe", "template"])
def test_each_error_is_a_code(kind, method, private, monkeypatch, capfd):
    error = kind.__new__(kind)
    error.args = (f"{MARKER} in a file",)

    class Broken:
        def describe(self):
            raise error

        template = describe

    monkeypatch.setattr(client, "_site", lambda *_: Broken())
    if method == "describe":
        content, sent = answer(private, question())
    else:
        asked = question()
        message = RecordDict({"question": ConfigRecord(asked), "server": wire.arrays({})})
        reply = client.app(
            Message(message, dst_node_id=1, message_type="train", ttl=60.0),
            Context(1, 1, private, RecordDict(), {}),
        )
        content, sent = reply.content, message_to_proto(reply).SerializeToString()
    code = code_of(error)
    assert dict(content.config_records["refused"]) == {"code": code}
    assert MARKER.encode() not in sent
    said = capfd.readouterr().err
    assert MARKER in said and ("Traceback" in said) == (code == "internal")


def test_each_error_of_wrong_input_has_a_code_of_its_own():
    never_at_sites = {
        "AttackError",
        "ClusterError",
        "EndpointError",
        "GuardError",
        "PartitionError",
        "TargetError",
    }
    for kind in input_errors():
        assert code_of(kind.__new__(kind)) != "internal" or kind.__name__ in never_at_sites
    assert set(CODES.values()) | {"internal"} == set(wire.REFUSALS)


def test_who_stops_a_site_is_obeyed(private, monkeypatch):
    for kind in (KeyboardInterrupt, SystemExit):

        def stopped(*_, kind=kind):
            raise kind

        monkeypatch.setattr(client, "_site", stopped)
        with pytest.raises(kind):
            answer(private, question())


def test_a_description_holds_counts_and_one_hash(private):
    content, sent = answer(private, question())
    said = json.loads(content.config_records["site"]["json"])
    assert MARKER.encode() not in sent and said["examples"] > 0
    values = (*said.values(), *said["data"].values(), *said["filter"].values())
    assert [value for value in values if isinstance(value, str)] == [said["base"]]
