"""A workdir has one owner: a second run is refused, what was killed is taken over."""

import json
import multiprocessing
import os
import re
import time

import pytest
from etils import epath

from fedsafe_jax.runtime import owner
from fedsafe_jax.runtime.owner import InUseError, Owner, owned


@pytest.fixture(autouse=True)
def watched(monkeypatch):
    """A second at most for what would be a minute."""
    monkeypatch.setattr(owner, "WATCHED_S", 0.05)


@pytest.fixture(params=["disk", "bucket"])
def workdir(request, tmp_path, monkeypatch):
    if request.param == "disk":
        return epath.Path(tmp_path) / "run"
    monkeypatch.setattr(owner, "SETTLED_S", 0.0)
    return request.getfixturevalue("bucket") / "run"


def written(workdir) -> dict:
    return json.loads((workdir / "owner.json").read_text())


def changed(workdir, **fields) -> None:
    (workdir / "owner.json").write_text(json.dumps(written(workdir) | fields))


def test_a_second_run_is_refused_and_the_first_one_gives_back(workdir):
    with owned(workdir) as first:
        started = written(workdir)["started"]
        with pytest.raises(InUseError) as error, owned(workdir):
            pass
        line = str(error.value)
        assert f"process {os.getpid()} on " in line and started in line and str(workdir) in line
        assert "Wait until that run ends" in line and "\n" not in line
        first.check()  # the refused one has changed nothing
    assert not (workdir / "owner.json").exists()
    with pytest.raises(ZeroDivisionError), owned(workdir):
        raise ZeroDivisionError
    assert not (workdir / "owner.json").exists()
    if "://" not in str(workdir):
        assert not os.listdir(workdir)


def test_another_hosts_run_is_stale_after_ten_minutes(workdir):
    with owned(workdir):
        left = written(workdir)
    (workdir / "owner.json").write_text(json.dumps(left | {"host": "elsewhere", "process": 7}))
    for age in (0, 500, -500):
        changed(workdir, heartbeat=time.time() - age)
        with pytest.raises(InUseError, match="process 7 on elsewhere"):
            Owner(workdir)
    for age in (700, -5000):  # a clock that is an hour ahead is no sign of life either
        changed(workdir, heartbeat=time.time() - age, run="another", host="elsewhere")
        with owned(workdir):
            assert written(workdir)["run"] not in ("another", left["run"])
        (workdir / "owner.json").write_text(json.dumps(left | {"host": "elsewhere"}))


def test_a_clock_that_jumps_takes_no_workdir_from_a_run_that_lives(workdir, monkeypatch):
    monkeypatch.setattr(owner, "RENEWED_S", 0.05)
    monkeypatch.setattr(owner, "WATCHED_S", 0.5)
    monkeypatch.setattr(owner, "_is_here", lambda there: False)  # as on another host
    with owned(workdir) as first:
        clock = time.time
        for jump in (5000, -5000):
            seen = iter([clock() + jump] * 3)  # of the second run, as it looks for the first time
            silent = owner._is_silent

            def jumped(there, seen=seen, silent=silent):
                with monkeypatch.context() as patch:
                    patch.setattr(time, "time", lambda: next(seen))
                    return silent(there)

            monkeypatch.setattr(owner, "_is_silent", jumped)
            with pytest.raises(InUseError, match="is in use by process"):
                Owner(workdir)
            monkeypatch.setattr(owner, "_is_silent", silent)
        first.check()


def test_a_kill_within_the_claim_leaves_nothing_that_blocks(tmp_path, monkeypatch):
    """The file is whole from its first moment: one that says nothing would be waited for."""

    class KilledError(BaseException):
        pass

    def kill(*args):
        raise KilledError

    for call in ("link", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, kill)
            with pytest.raises(KilledError):
                Owner(epath.Path(tmp_path))
        assert not (tmp_path / "owner.json").exists()
    with owned(epath.Path(tmp_path)):
        pass


def test_what_a_killed_run_left_half_written_goes_when_the_next_one_has_the_workdir(tmp_path):
    left = [".inputs.json.abcd_123.tmp", "arms/.fl.json.abcd1234.tmp", "arms/.mine.tmp"]
    for name in (*left, ".owner.json.abcd1234.tmp"):  # of a run that looks at the same moment
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "half").write_text("{")
    with owned(epath.Path(tmp_path)):
        there = [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.tmp")]
    assert sorted(there) == [".owner.json.abcd1234.tmp", "arms/.mine.tmp"]
    assert [p.name for p in tmp_path.rglob("*.tmp")] == [".mine.tmp"]


def _own_and_die(workdir):
    Owner(epath.Path(workdir))
    os._exit(9)


def test_a_killed_run_of_this_host_gives_way_at_once(tmp_path):
    killed = multiprocessing.get_context("forkserver").Process(
        target=_own_and_die, args=(tmp_path,)
    )
    killed.start()
    killed.join(60)
    assert killed.exitcode == 9
    left = written(tmp_path)
    assert left["process"] == killed.pid and time.time() - left["heartbeat"] < 60
    with owned(epath.Path(tmp_path)):
        assert written(tmp_path)["run"] != left["run"]
    # The number of the process was given to another one.
    (tmp_path / "owner.json").write_text(json.dumps(left | {"process": os.getpid()}))
    with owned(epath.Path(tmp_path)):
        pass
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("content", ["", '{"run": "a', "[]", '{"heartbeat": "soon"}'])
def test_an_owner_file_that_says_nothing(tmp_path, content):
    path = tmp_path / "owner.json"
    path.write_text(content)
    if content[:2] != '{"' or content.endswith("a"):  # its own time counts
        with pytest.raises(InUseError):
            Owner(epath.Path(tmp_path))
        os.utime(path, (time.time() - 700,) * 2)
    with owned(epath.Path(tmp_path)):
        assert written(tmp_path)["process"] == os.getpid()


def test_the_sign_of_life_is_renewed_and_a_take_over_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(owner, "RENEWED_S", 0.01)
    with owned(epath.Path(tmp_path)) as mine:
        before = written(tmp_path)["heartbeat"]
        deadline = time.monotonic() + 30
        while written(tmp_path)["heartbeat"] == before:
            assert time.monotonic() < deadline
        mine.check()
        own = written(tmp_path)
        other = own | {"run": "other", "process": 8, "host": "elsewhere"}
        for _ in range(1000):  # against its own renewal, at the same time
            (tmp_path / "owner.json").write_text(json.dumps(other))
            time.sleep(0.02)
            if mine._lost:
                break
        with pytest.raises(InUseError, match="process 8 on elsewhere"):
            mine.check()
    assert written(tmp_path) == other  # what is another's is not removed


def _race(folder, ready, answers):
    owner.WATCHED_S = 0.2
    ready.wait()
    try:
        Owner(epath.Path(folder))
        answers.put("owner")
        time.sleep(2)
    except InUseError as error:
        answers.put(re.sub(r"\d+", "N", str(error)))
    answers.close()
    answers.join_thread()
    os._exit(0)


@pytest.mark.parametrize("stale", [False, True])
def test_of_two_that_start_together_one_goes_on(tmp_path, stale):
    if stale:
        with owned(epath.Path(tmp_path)):
            left = written(tmp_path)
        gone = left | {"host": "elsewhere", "heartbeat": 0.0}
        (tmp_path / "owner.json").write_text(json.dumps(gone))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fedsafe_jax.runtime.owner"])
    ready, answers = context.Event(), context.Queue()
    racers = [context.Process(target=_race, args=(tmp_path, ready, answers)) for _ in range(3)]
    for racer in racers:
        racer.start()
    ready.set()
    said = [answers.get(timeout=60) for _ in racers]
    for racer in racers:
        racer.join(60)
    assert said.count("owner") == 1
    assert all("is in use by process N" in line for line in said if line != "owner")
