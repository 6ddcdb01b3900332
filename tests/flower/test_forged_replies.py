"""Whatever one site sends, the others' round goes on, and ends as without that site."""

import json

import numpy as np
import pytest
from etils import epath

pytest.importorskip("flwr")

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, MetricRecord  # noqa: E402
from forged_replies import (  # noqa: E402
    CLIENTS,
    FACTORS,
    FORGER,
    NAME,
    STEPS,
    Log,
    ScriptedGrid,
    Server,
    assert_lines,
    assert_same,
    described,
    description,
    federation_config,
    flower_process,
    forger,
    honest,
    nodes,
    programs,
    with_array,
    with_number,
)
from jax.flatten_util import ravel_pytree  # noqa: E402

from fedsafe_jax.flower import seats  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def process():
    with flower_process():
        yield


@pytest.fixture(scope="module")
def compiled():
    """Programs by keyword arguments of `programs`, each built once."""
    built = {}

    def of(**options):
        key = tuple(sorted(options.items()))
        return built.setdefault(key, programs(**options))

    return of


def text(reason):
    return {"reason": reason}


def replaced(name, record):
    def forge(content):
        content[name] = record
        return content

    return forge


def without(record, *fields):
    def forge(content):
        if not fields:
            del content[record]
        for field in fields:
            del content[record][field]
        return content

    return forge


def number(name, value):
    return lambda content: with_number(content, name, value)


def array(name=NAME, **changes):
    return lambda content: with_array(content, name, **changes)


def values(change, name=NAME):
    """Changes the numbers of an array, whose claims then fit."""

    def forge(content):
        x = content["update"][name].numpy().copy()
        content["update"][name] = Array(np.asarray(change(x), np.float32))
        return content

    return forge


def npz(content):
    import io

    file = io.BytesIO()
    np.savez(file, x=np.zeros(1, np.float32))
    return with_array(content, data=file.getvalue()[:150].ljust(150, b"\0"))


def header(text, size=64):
    """An .npy file with another header than Flower's fields say."""

    def forge(content):
        body = text.ljust(117).encode() + b"\n"
        head = b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body
        return with_array(content, data=head + bytes(48))

    return forge


INF, NAN = float("inf"), float("nan")
ESCAPES = "\x1b[2J\x1b]0;owned\x07 WARNING: forged\u202e line " + "x" * 10**6
UNKNOWN_CODE = "a code that is not known here"
# What a site may send in place of an update; the second value is the record that names it, or a
# part of the reason.
UPDATES = {
    "error without a reason": (lambda content: Error(0, ""), "no reason given"),
    "error with None": (lambda content: Error(0, None), "no text, but NoneType"),
    "error of a traceback": (lambda content: Error(2, "Trace\n  deep\nEnd: x\n\n"), "End: x"),
    "error with escapes": (lambda content: Error(0, ESCAPES), "x"),
    "bytes that cannot be unpacked": (lambda content: RecursionError(), "cannot be unpacked"),
    "refused": (replaced("refused", ConfigRecord({"code": "data"})), "(code data;"),
    "refused with a text": (replaced("refused", ConfigRecord(text("no data"))), UNKNOWN_CODE),
    "refused with escapes": (replaced("refused", ConfigRecord({"code": ESCAPES})), UNKNOWN_CODE),
    "refused with a number": (replaced("refused", ConfigRecord({"code": 5})), UNKNOWN_CODE),
    "refused without code": (replaced("refused", ConfigRecord({})), UNKNOWN_CODE),
    "refused as arrays": (replaced("refused", ArrayRecord({})), "KeyError"),
    "no update": (without("update"), "KeyError"),
    "update as numbers": (replaced("update", MetricRecord({"x": 1})), "KeyError"),
    "no numbers": (without("numbers"), "KeyError"),
    "no tokens": (without("numbers", "useful_tokens"), "useful_tokens=None"),
    "tokens NaN": (number("useful_tokens", NAN), "useful_tokens=nan"),
    "tokens infinite": (number("useful_tokens", INF), "useful_tokens=inf"),
    "tokens below 0": (number("useful_tokens", -(10**18)), "useful_tokens=-1"),
    "more tokens than fit": (number("useful_tokens", STEPS * 4 * 16 + 1), "useful_tokens=129"),
    "half a token": (number("useful_tokens", 1.5), "useful_tokens=1.5"),
    "tokens as a list": (number("useful_tokens", [1, 2]), "useful_tokens=[1, 2]"),
    "finite 2": (number("finite", 2), "finite=2"),
    "finite missing": (without("numbers", "finite"), "finite=None"),
    "array missing": (without("update", NAME), f"array {NAME} is missing"),
    "no losses": (without("update", "losses"), "array losses is missing"),
    "unknown array": (
        lambda content: (
            content["update"].__setitem__("\x1b[31mmore", Array(np.zeros(1, np.float32))) or content
        ),
        "is not known here",
    ),
    "losses NaN": (values(lambda x: x * NAN, "losses"), "its losses are not finite"),
    "losses infinite": (values(lambda x: x - INF, "losses"), "its losses are not finite"),
    "another shape": (values(lambda x: x[..., :-1]), "expected float32 [2, 3, 2]"),
    "shape claimed": (array(shape=(2, 3, 10**12)), "expected float32 [2, 3, 2]"),
    "dtype claimed": (array(dtype="object"), "object [2, 3, 2], expected float32"),
    "torch": (array(stype="torch.Tensor"), "torch.Tensor of 176 bytes"),
    "no bytes": (array(data=b""), "of 0 bytes"),
    "few bytes": (array(data=b"\x93NUMPY"), "of 6 bytes"),
    "many bytes": (array(data=bytes(10**6)), "of 1000000 bytes"),
    "junk": (array(data=bytes(range(170))), "is no .npy file"),
    "npz": (npz, "is no .npy file"),
    "header of 10 TB": (
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000000,)}"),
        "is no .npy file",
    ),
    "header of objects": (
        header("{'descr': '|O', 'fortran_order': False, 'shape': (2, 3, 2)}"), "is no .npy file",
    ),
    "header of the other byte order": (
        header("{'descr': '>f4', 'fortran_order': False, 'shape': (2, 3, 2)}"), "is no .npy file",
    ),
    "header that is no Python": (header("{'descr': ((((("), "is no .npy file"),
    "header of nested brackets": (header("(" * 110), "is no .npy file"),
}  # fmt: skip


@pytest.fixture(scope="module")
def without_forger(compiled, tmp_path_factory):
    """`options -> state of the server` after a round in which the forger keeps silent."""
    ended = {}

    def after(algorithm="fedavg", **options):
        key = (algorithm, *sorted(options.items()))
        if key not in ended:
            control = algorithm == "scaffold"
            silent = {100 + i: honest(i, control) for i in range(CLIENTS)}
            silent[100 + FORGER] = forger(lambda content: None, control)
            folder = epath.Path(tmp_path_factory.mktemp("alone"))
            here = compiled(algorithm=algorithm, **options)
            run = Server(ScriptedGrid(silent), folder, here, algorithm=algorithm)
            assert run.round()["no_answer"] == [FORGER]
            ended[key] = run.adapter
        return ended[key]

    return after


@pytest.mark.parametrize("name", UPDATES)
def test_a_forged_update_is_left_out_by_name(name, compiled, without_forger, tmp_path):
    forge, reason = UPDATES[name]
    run = Server(ScriptedGrid(nodes(n101=forger(forge))), epath.Path(tmp_path), compiled())
    row = run.round()
    assert row["no_answer"] == [FORGER] and not row["skipped"] and row["useful_tokens"] == 82
    assert np.isfinite(row["loss"])
    (line,) = run.log.warnings
    assert line.startswith(f"round 1: client {FORGER} is left out: ") and reason in line
    assert_lines([line], ["client 1"])
    assert_same(run.adapter, without_forger())
    # The site is asked again, and counts again where its answer is one.
    assert run.round(1)["no_answer"] == [FORGER]


@pytest.mark.parametrize("aggregator", ["mean", "median"])
@pytest.mark.parametrize("value", [3e38, -3e38, 2e19, NAN, INF])
def test_an_update_that_cannot_be_measured_costs_its_round(
    value, aggregator, compiled, without_forger, tmp_path
):
    grid = ScriptedGrid(nodes(n101=forger(values(lambda x: x * 0 + value))))
    run = Server(grid, epath.Path(tmp_path), compiled(aggregator=aggregator))
    row = run.round()
    assert row["excluded"] == [FORGER] and row["no_answer"] == [] and not row["skipped"]
    assert row["delta_norms"][FORGER] == 0 and np.isfinite(row["loss"])
    assert_same(run.adapter, without_forger(aggregator=aggregator))


@pytest.mark.parametrize("name", ["update.q_proj.b", "control.q_proj.a"])
@pytest.mark.parametrize("value", [3e38, NAN])
def test_control_variates_are_measured_too(name, value, compiled, without_forger, tmp_path):
    scripted = {100 + i: honest(i, True) for i in range(CLIENTS)}
    scripted[101] = forger(values(lambda x: x * 0 + value, name), control=True)
    run = Server(
        ScriptedGrid(scripted),
        epath.Path(tmp_path),
        compiled(algorithm="scaffold"),
        algorithm="scaffold",
    )
    assert run.round()["excluded"] == [FORGER]
    assert_same(run.adapter, without_forger(algorithm="scaffold"))


def test_lengths_are_measured_and_clipped_by_the_server(compiled, tmp_path):
    """Of what the site sends, whatever it says of it; a control has the bound of an update."""
    scripted = {100 + i: honest(i, True) for i in range(CLIENTS)}

    def long(content):
        for name in ("update.q_proj.a", "control.q_proj.a"):
            content = values(lambda x: x * 1e6, name)(content)
        content = values(lambda x: -np.abs(x) - 1e30, "losses")(content)
        content["numbers"]["norm"] = 1.0
        return values(lambda x: x * 0 - 7.0, "active")(content)

    scripted[101] = forger(long, control=True)
    made = compiled(algorithm="scaffold", clip_norm=1.0)
    run = Server(ScriptedGrid(scripted), epath.Path(tmp_path), made, algorithm="scaffold")
    row = run.round()
    assert row["no_answer"] == row["excluded"] == [] and row["delta_norms"][FORGER] > 1e4
    assert row["cosines"][FORGER] > 0.5 and 0 <= row["loss"] < 1
    start, _ = ravel_pytree(FACTORS)
    moved, _ = ravel_pytree(run.adapter.factors)
    control, _ = ravel_pytree(run.adapter.control)
    assert np.linalg.norm(moved - start) <= 1 + 1e-5 and np.linalg.norm(control) <= 1 + 1e-5


def test_losses_have_a_ceiling(compiled, tmp_path):
    grid = ScriptedGrid(nodes(n101=forger(values(lambda x: x * 0 + 3e38, "losses"))))
    run = Server(grid, epath.Path(tmp_path), compiled())
    assert 1e5 < run.round()["loss"] < 1e6


def json_text(whole):
    def forge(content):
        del content
        content = described(FORGER)
        content["site"] = ConfigRecord({"json": whole})
        return content

    return forge


def description_of(**changes):
    return json_text(json.dumps(description(FORGER) | changes))


def with_text(old, new):
    return json_text(json.dumps(description(FORGER)).replace(old, new))


DESCRIPTIONS = {
    "error": lambda content: Error(0, ""),
    "escapes": lambda content: Error(0, ESCAPES),
    "refused by a number": replaced("refused", ConfigRecord({"code": 5})),
    "refused by bytes": replaced("refused", ConfigRecord({"code": b"\xff"})),
    "nothing": without("site"),
    "a number for JSON": json_text(5),
    "no JSON": json_text("not JSON"),
    "a list": json_text("[]"),
    "null": json_text("null"),
    "nested": json_text("[" * 20000 + "]" * 20000),
    "too long": json_text(" " * 10**6),
    "client infinite": with_text('"client": 1', '"client": Infinity'),
    "client as text": description_of(client="1"),
    "client true": description_of(client=True),
    "client below 0": description_of(client=-1),
    "client not in this run": description_of(client=CLIENTS),
    "client of 400 digits": description_of(client=10**400),
    "client of 10,000 digits": with_text('"client": 1', '"client": ' + "1" * 10000),
    "examples infinite": with_text('"examples": 10', '"examples": Infinity'),
    "examples of 400 digits": description_of(examples=10**400),
    "examples below 0": description_of(examples=-1),
    "half an example": description_of(examples=9.5),
    "more than all learned": description_of(learned=10.5),
    "learned NaN": with_text('"learned": 10.0', '"learned": NaN'),
    "learned missing": description_of(learned=None),
    "another base": description_of(base="0" * 64),
    "base as a list": description_of(base=[[[]]]),
    "no counts": description_of(filter=None),
    "a count missing": description_of(filter={"kept": 1}),
    "near infinite": with_text('"dropped_heldout": 0', '"dropped_heldout": Infinity'),
    "data as a list": description_of(data=[]),
}


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_a_forged_description_is_left_out_by_name(name, tmp_path):
    grid = ScriptedGrid(nodes(n101=forger(DESCRIPTIONS[name], kind="query")))
    log = Log()
    asked = federation_config()
    asked.clients_per_round = 2
    room = seats.Seats(grid, asked, {}, patience=1.0, file=epath.Path(tmp_path) / "s", progress=log)
    room.gather(0.02)
    assert room.nodes == {0: 100, 2: 102} and room.pairs == 20 and room.sizes == [10, 0, 10]
    assert_lines(log.warnings, ["node 101"])
    assert len(log.warnings) == 1
