"""Who sits where, and what slow, silent, late and repeated answers cost: on a grid with a clock."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from etils import epath

pytest.importorskip("flwr")

from flwr.app import Message  # noqa: E402
from forged_replies import (  # noqa: E402
    CLIENTS,
    Clock,
    ScriptedGrid,
    Server,
    assert_same,
    described,
    federation_config,
    flower_process,
    honest,
    nodes,
    programs,
    update,
)

from fedsafe_jax.flower import mail, seats, server  # noqa: E402
from fedsafe_jax.whole_files import WorkdirError  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def process():
    with flower_process():
        yield


@pytest.fixture(scope="module")
def compiled():
    return programs()


@pytest.fixture
def clock(monkeypatch):
    """A clock in place of `time`, whole seconds of which pass at once."""
    here = Clock()
    for module in (seats, server):
        monkeypatch.setattr(module, "time", here)
    monkeypatch.setattr(mail, "SLICE", 1.0)
    return here


@pytest.fixture
def workdir(tmp_path):
    return epath.Path(tmp_path)


def silent(message):
    del message
    return []


def seat_taker(client):
    """A stranger that says it is `client`, and sends a large update."""

    def answers(message):
        if message.metadata.message_type == "query":
            return [Message(described(client), reply_to=message)]
        return [Message(update(client, length=1e3), reply_to=message)]

    return answers


def two_of_three(**federated):
    config = federation_config(**federated)
    config.clients_per_round = 2
    return config


def test_a_silent_node_delays_nobody(compiled, workdir, clock):
    """Neither those that come later, who are asked while it keeps silent, nor the start."""
    grid = ScriptedGrid({99: silent} | nodes(), {100: 3, 101: 5, 102: 8}, clock)
    run = Server(grid, workdir, compiled, wait_s=600, round_s=60)
    assert clock.now == 8 and run.sites.seats.nodes == {0: 100, 1: 101, 2: 102}
    late = {101: grid.answers.pop(101)}
    clock.now = 0.0
    grid.delays.clear()

    class Joined(ScriptedGrid):
        def get_node_ids(self):
            return [n for n in self.answers if n != 101 or self.clock.now >= 4]

    grid = Joined({99: silent} | grid.answers | late, clock=clock)
    run = Server(grid, workdir, compiled, wait_s=600, round_s=60)
    assert clock.now == 4 and len(run.sites.seats.nodes) == CLIENTS


def test_a_federation_starts_without_those_that_come_later_and_takes_them_in(
    compiled, workdir, clock
):
    grid = ScriptedGrid(nodes(), {101: 15}, clock)
    run = Server(grid, workdir, compiled, wait_s=10, round_s=20, config=two_of_three())
    assert clock.now == 10 and run.sites.seats.nodes == {0: 100, 2: 102}
    grid.delays = {100: 8.0}
    seen = [run.round(t) for t in range(3)]
    assert run.sites.seats.nodes == {0: 100, 2: 102, 1: 101}
    assert all(row["no_answer"] == [] for row in seen)
    assert seen[0]["no_data"] or any(1 in row["clients"] for row in seen)


def test_too_few_sites_are_one_error_at_the_end_of_the_wait(compiled, workdir, clock):
    grid = ScriptedGrid({100: honest(0), 101: silent, 102: silent}, clock=clock)
    with pytest.raises(server.SitesError, match="1 of 3 sites take part, a round needs"):
        Server(grid, workdir, compiled, wait_s=30)
    assert clock.now == 30


def test_a_refused_node_is_asked_again_once_it_may_be_mended(compiled, workdir, clock):
    def mended(message):
        if message.metadata.message_type == "query" and clock.now < 100:
            return [Message(described(1, base="other"), reply_to=message)]
        return honest(1)(message)

    grid = ScriptedGrid(nodes(n101=mended), clock=clock)
    run = Server(grid, workdir, compiled, wait_s=600)
    assert [at for at, node, _ in grid.asked if node == 101] == [0, seats.AGAIN, 2 * seats.AGAIN]
    assert len(run.log.warnings) == 1 and "client 1's base model differs" in run.log.warnings[0]
    assert run.sites.seats.nodes[1] == 101


def test_a_stranger_does_not_get_a_seat_that_is_given(compiled, workdir, clock):
    """The stranger is there first; the run config names the honest nodes."""
    answers = {99: seat_taker(0)} | nodes()
    run = Server(
        ScriptedGrid(answers, clock=clock), workdir, compiled, given={0: 100, 1: 101, 2: 102}
    )
    assert run.sites.seats.nodes == {0: 100, 1: 101, 2: 102}
    assert "node 99 is left out: the seat of client 0 is node 100's" in run.log.warnings[0]
    # A client that is given to no node has no seat.
    grid = ScriptedGrid(nodes(), clock=clock)
    run = Server(grid, workdir, compiled, given={0: 100, 2: 102}, config=two_of_three())
    assert run.sites.seats.nodes == {0: 100, 2: 102}
    assert "seats have none for client 1" in run.log.warnings[0]


def test_a_seat_outlives_the_server(compiled, workdir, clock):
    """First come, first served; but what was served is written down."""
    Server(ScriptedGrid(nodes(), clock=clock), workdir, compiled)
    assert json.loads((workdir / "seats.json").read_text()) == {"0": 100, "1": 101, "2": 102}
    answers = {99: seat_taker(0)} | nodes()
    run = Server(ScriptedGrid(answers, clock=clock), workdir, compiled)
    assert run.sites.seats.nodes == {0: 100, 1: 101, 2: 102}
    (line,) = run.log.warnings
    assert "node 99 is left out: the seat of client 0 is node 100's" in line
    assert "seats.json" in line


def test_a_node_has_one_seat(compiled, workdir, clock):
    claims = iter([0, 1, 2])

    def greedy(message):
        return [Message(described(next(claims)), reply_to=message)]

    grid = ScriptedGrid({99: greedy} | nodes(), clock=clock)
    room = seats.Seats(
        grid, federation_config(), {}, patience=5, file=workdir / "s", progress=SimpleNamespace(
            warn=lambda text: None, note=lambda text: None
        ),
    )  # fmt: skip
    room.gather(1)
    assert room.nodes == {0: 99, 1: 101, 2: 102}
    room.answered(0, in_time=False)
    room.answered(0, in_time=False)
    clock.now += seats.AGAIN
    room.poll()
    assert room.nodes == {0: 99, 1: 101, 2: 102} and room.benched(0)


@pytest.mark.parametrize(
    "content",
    ["", "[1]", "null", '{"0": "x"}', '{"a": 1}', '{"0": 1.5}', "[" * 9999, '{"0": true}'],
)
def test_a_damaged_file_of_seats_stops_the_run(content, compiled, workdir, clock):
    (workdir / "seats.json").write_text(content)
    with pytest.raises(WorkdirError, match="seats.json: expected the node of each client"):
        Server(ScriptedGrid(nodes(), clock=clock), workdir, compiled)
    assert (workdir / "seats.json").read_text() == content


@pytest.mark.parametrize("text", ["0", "0=", "=5", "a=5", "0=5,0=6", "0=5,1=5", "-1=5", "0=5;1=6"])
def test_seats_of_the_run_config_are_checked(text):
    assert seats.parse_seats("") == {} and seats.parse_seats("0=5, 1=6") == {0: 5, 1: 6}
    with pytest.raises(ValueError, match="expected CLIENT=NODE|is there twice"):
        seats.parse_seats(text)


def test_a_round_ends_by_its_deadline_and_a_silent_site_is_benched(compiled, workdir, clock):
    """Two rounds wait for it; then none does, until it answers again."""
    quiet = [True]

    def sometimes(message):
        if quiet[0] and (message.metadata.message_type == "train" or clock.now > 0):
            return []
        return honest(1)(message)

    grid = ScriptedGrid(nodes(n101=sometimes), {100: 2, 102: 7}, clock)
    grid.delays = {}
    run = Server(grid, workdir, compiled, round_s=30)
    grid.delays = {100: 2, 102: 7}
    lengths, rows = [], []
    for t in range(6):
        began = clock.now
        if t == 4:
            quiet[0] = False
            clock.now += 2 * seats.AGAIN  # such as a round of Constitutional AI
            began = clock.now
        rows.append(run.round(t))
        lengths.append(clock.now - began)
    assert lengths == [30, 30, 7, 7, 7, 7]
    assert [row["no_answer"] for row in rows] == [[1], [1], [1], [1], [1], []]
    assert not any(row["skipped"] for row in rows)
    said = "\n".join(run.log.warnings)
    assert "client 1 is left out: no answer in time" in said and "client 1 is benched" in said
    assert "client 1 is left out: benched until it answers again" in said
    assert "client 1 is back" in run.log.notes


def test_one_missed_round_does_not_bench(compiled, workdir, clock):
    def every_other(message):
        if message.metadata.message_type == "train":
            t = message.content.config_records["question"]["round"]
            return honest(1)(message) if t % 2 else []
        return honest(1)(message)

    run = Server(ScriptedGrid(nodes(n101=every_other), clock=clock), workdir, compiled, round_s=9)
    assert [run.round(t)["no_answer"] for t in range(5)] == [[1], [], [1], [], [1]]
    assert not run.sites.seats.benched(1)


def test_chunks_of_a_round_share_its_deadline(compiled, workdir, clock):
    """The first chunk waits for a silent site; the others' answers are there by then."""
    config = federation_config()
    config.chunk_clients = 1
    grid = ScriptedGrid(nodes(), clock=clock)
    run = Server(grid, workdir, compiled, round_s=30, config=config)
    grid.answers[100] = silent
    grid.delays = {102: 4}
    row = run.round()
    assert clock.now == 30 and row["no_answer"] == [0] and not row["skipped"]


def test_late_duplicate_and_replayed_answers_are_not_seen(compiled, workdir, clock):
    """Each round has questions of its own, and the first answer to a question is the one."""
    kept = []

    def nasty(message):
        if message.metadata.message_type == "query":
            return honest(1)(message)
        (reply,) = honest(1)(message)
        kept.append(reply)
        again = Message(update(1, length=1e3), reply_to=message)
        # An answer to an older question; then the right one; then one more.
        return [kept[0], reply, again] if len(kept) > 1 else [reply, again]

    grid = ScriptedGrid(nodes(n101=nasty), clock=clock)
    run, alone = (
        Server(one, workdir, compiled, round_s=30)
        for one in (grid, ScriptedGrid(nodes(), clock=clock))
    )
    for t in range(3):
        assert run.round(t)["no_answer"] == alone.round(t)["no_answer"] == []
    assert_same(run.adapter, alone.adapter)
    # Too late: the round is over, and the next one does not look at it.
    grid.delays = {101: 31}
    alone.sites.grid.answers[101] = silent
    alone.sites.seats.answered = lambda client, in_time: None
    for t in (3, 4):
        assert run.round(t)["no_answer"] == alone.round(t)["no_answer"] == [1]
    assert_same(run.adapter, alone.adapter)


def test_a_server_that_dies_in_a_round_repeats_it(compiled, workdir, clock):
    def dies(message):
        if message.metadata.message_type == "train" and not died:
            died.append(True)
            raise KeyboardInterrupt
        return honest(2)(message)

    died = []
    grid = ScriptedGrid(nodes(n102=dies), clock=clock)
    first = Server(grid, workdir, compiled, round_s=30)
    before = first.state
    with pytest.raises(KeyboardInterrupt):
        first.round()
    again = Server(grid, workdir, compiled, round_s=30)
    again.state = before
    whole = Server(ScriptedGrid(nodes(), clock=clock), workdir, compiled, round_s=30)
    for t in range(2):
        assert again.round(t)["no_answer"] == whole.round(t)["no_answer"] == []
    assert_same(again.adapter, whole.adapter)


def test_a_link_that_is_down_ends_the_run_and_is_no_sites_fault(compiled, workdir, clock):
    grid = ScriptedGrid(nodes(), clock=clock)
    run = Server(grid, workdir, compiled, round_s=30)

    def down(messages):
        raise ConnectionError("no SuperLink")

    grid.push_messages = down
    with pytest.raises(ConnectionError):
        run.round()


def test_a_site_claims_at_most_twice_the_size_of_an_ordinary_one(compiled, workdir, clock):
    def large(message):
        if message.metadata.message_type == "query":
            return [Message(described(1, examples=10**9, learned=1e9), reply_to=message)]
        return honest(1)(message)

    start = Server(ScriptedGrid(nodes(), clock=clock), workdir, compiled).adapter.factors
    moved = {}
    for name, weighting in (("uniform", "uniform"), ("examples", "examples")):
        run = Server(
            ScriptedGrid(nodes(n101=large), clock=clock), workdir, compiled,
            config=federation_config(weighting=weighting),
        )  # fmt: skip
        run.round()
        moved[name] = run.adapter.factors["q_proj"]["a"] - start["q_proj"]["a"]
    sent = [update(i)["update"]["update.q_proj.a"].numpy() for i in range(CLIENTS)]
    np.testing.assert_allclose(moved["uniform"], sum(sent) / 3, atol=1e-6)
    np.testing.assert_allclose(moved["examples"], (sent[0] + 2 * sent[1] + sent[2]) / 4, atol=1e-6)
