"""Forged replies of one site of three: the round goes on, and ends as without the forger."""

import json
import tempfile

import numpy as np
import pytest
from etils import epath
from fuzzing import EXAMPLES, fuzzed
from hypothesis import event, given, settings
from hypothesis import strategies as st

pytest.importorskip("flwr")

from flwr.app import (  # noqa: E402
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    MetricRecord,
    RecordDict,
)
from forged_replies import (  # noqa: E402
    FORGER,
    ScriptedGrid,
    Server,
    assert_lines,
    assert_same,
    description,
    federation_config,
    flower_process,
    forger,
    nodes,
    programs,
)

NAMES = ["update.q_proj.a", "update.q_proj.b", "losses", "active"]
NUMBERS = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.lists(st.integers(0, 9), max_size=2),
    st.sampled_from([0, 1, 128, 129, 1e38]),
)
BYTES = st.one_of(
    st.binary(max_size=300),
    st.builds(lambda head, tail: b"\x93NUMPY\x01\x00" + head + tail, st.binary(max_size=120),
              st.binary(min_size=20, max_size=80)),
)  # fmt: skip
TEXTS = st.one_of(st.none(), st.text(max_size=400), st.just("\x1b[2J\n" * 500), st.integers(0, 9))
CONFIG_VALUES = st.one_of(
    st.text(max_size=300), st.binary(max_size=9), st.integers(-9, 9), st.booleans()
)
RECORDS = st.one_of(
    st.dictionaries(st.text(max_size=9), CONFIG_VALUES, max_size=3).map(ConfigRecord),
    st.dictionaries(st.text(max_size=9), st.floats(), max_size=3).map(MetricRecord),
    st.just({"x": Array(np.zeros(2, np.float32))}).map(ArrayRecord),
)
CLAIMS = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["float64", "object", "<f4", "float32", ""]),
        "shape": st.lists(st.integers(-1, 10**13), max_size=4).map(tuple),
        "stype": st.sampled_from(["torch.Tensor", "numpy.ndarray", ""]),
        "data": BYTES,
    },
)
# Numbers that fit, but may be any float32.
VALUES = st.floats(width=32) | st.sampled_from([3e38, 1e20, -1e19, float("nan"), float("inf")])


def forge_claims(content, name, claims):
    old = content["update"][name]
    fields = {k: getattr(old, k) for k in ("dtype", "shape", "stype", "data")} | claims
    content["update"][name] = Array(**fields)


def forge_bytes(content, name, place, value):
    """Flips one byte, of the header or of the numbers."""
    data = bytearray(content["update"][name].data)
    data[place % len(data)] = value
    forge_claims(content, name, {"data": bytes(data)})


def forge_values(content, name, place, value):
    x = content["update"][name].numpy().copy()
    x.flat[place % x.size] = np.float32(value)
    content["update"][name] = Array(x)


def forge_number(content, name, value):
    content["numbers"][name] = value


def forge_record(content, name, record):
    content[name] = record


def forge_missing(content, name):
    del content["update"][name]


PLACES = st.integers(0, 10**4)
FORGED = st.one_of(
    st.tuples(st.just(forge_claims), st.sampled_from(NAMES), CLAIMS),
    st.tuples(st.just(forge_bytes), st.sampled_from(NAMES), PLACES, st.integers(0, 255)),
    st.tuples(st.just(forge_values), st.sampled_from(NAMES), PLACES, VALUES),
    st.tuples(st.just(forge_number), st.sampled_from(["useful_tokens", "finite", "x"]), NUMBERS),
    st.tuples(st.just(forge_record), st.sampled_from(["update", "numbers", "refused", "x"]),
              RECORDS),
    st.tuples(st.just(forge_missing), st.sampled_from(NAMES)),
)  # fmt: skip


@pytest.fixture(scope="module")
def compiled():
    with flower_process():
        yield programs()


def run(compiled, forge, kind="train"):
    """A server after a round with a site that forges its reply, and the row of the round."""
    with tempfile.TemporaryDirectory() as folder:
        grid = ScriptedGrid(nodes(n101=forger(forge, kind=kind)))
        server = Server(grid, epath.Path(folder), compiled, round_s=0.0, wait_s=0.0)
        return server, server.round()


@pytest.fixture(scope="module")
def endings(compiled):
    """The server's state after an honest round, and after one without the forger."""
    whole, _ = run(compiled, lambda content: content)
    alone, row = run(compiled, lambda content: None)
    assert row["no_answer"] == [FORGER]
    return whole.adapter, alone.adapter


def counted(server, row, endings):
    """Asserts what holds whatever was sent; returns whether the forged reply counted."""
    whole, alone = endings
    assert not row["skipped"] and row["clients"] == [0, FORGER, 2]
    assert np.isfinite(row["loss"]) and np.isfinite(row["update_norm"])
    assert 0 <= row["useful_tokens"] <= 82 + 128
    if row["no_answer"] or row["excluded"]:
        assert row["no_answer"] + row["excluded"] == [FORGER]
        assert_same(server.adapter, alone)
        if row["no_answer"]:
            assert_lines(server.log.warnings, [f"client {FORGER} is left out"])
        return False
    return True


@settings(fuzzed, max_examples=2 * EXAMPLES)
@given(forged=st.lists(FORGED, min_size=1, max_size=3))
def test_forged_updates(compiled, endings, forged):
    def forge(content):
        for change, *arguments in forged:
            try:
                change(content, *arguments)
            except (KeyError, AttributeError, TypeError, ValueError):
                pass  # of the forger's own, such as what an earlier change took away
        return content

    server, row = run(compiled, forge)
    if counted(server, row, endings):
        # A well-formed update: where its numbers are the honest ones, so is the adapter.
        event("counted")
        whole = endings[0].factors
        honest = (
            "update",
            "useful_tokens",
            "numbers",
            "x",
            "refused",
            "losses",
            "active",
            "finite",
        )
        touched = [arguments[0] for change, *arguments in forged]
        if all(name in honest for name in touched):
            assert_same(server.adapter.factors, whole)
    else:
        event("left out")


@settings(fuzzed, max_examples=EXAMPLES)
@given(reason=TEXTS, code=st.integers(-9, 9), refused=st.booleans())
def test_forged_errors_and_refusals(compiled, endings, reason, code, refused):
    def forge(content):
        if not refused:
            return Error(code, reason)
        record = ConfigRecord({} if reason is None else {"reason": reason})
        return RecordDict({"refused": record} | dict(content.array_records))

    server, row = run(compiled, forge)
    assert not counted(server, row, endings) and row["no_answer"] == [FORGER]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@settings(fuzzed, max_examples=2 * EXAMPLES)
@given(
    field=st.sampled_from([*description(FORGER), "filter.kept", "data.dropped_heldout"]),
    value=JSON,
    cut=st.integers(0, 400),
)
def test_forged_descriptions(compiled, field, value, cut):
    whole = description(FORGER)
    group, _, name = field.rpartition(".")
    (whole[group] if group else whole)[name] = value
    text = json.dumps(whole)
    text = text if cut > 200 else text[:cut]

    def forge(content):
        content["site"] = ConfigRecord({"json": text})
        return content

    config = federation_config()
    config.clients_per_round = 2
    with tempfile.TemporaryDirectory() as folder:
        grid = ScriptedGrid(nodes(n101=forger(forge, kind="query")))
        server = Server(grid, epath.Path(folder), compiled, wait_s=0.0, config=config)
        seated = server.sites.seats.nodes
        assert seated[0] == 100 and seated[2] == 102
        if FORGER in seated:
            assert seated[FORGER] == 101 and 0 <= server.sites.seats.sizes[FORGER] < 2**32
        else:
            assert_lines(server.log.warnings, ["node 101 is left out"])
