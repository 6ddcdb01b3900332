"""Checkpoints: what was saved comes back to the bit, and damage costs one round, not the run."""

import logging
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedsafe_jax.federated import algorithms
from fedsafe_jax.federated.algorithms import Hyperparameters, ServerState
from fedsafe_jax.federated.algorithms.adaptive import ADAM, adaptive
from fedsafe_jax.federated.client import LocalTraining, make_optimizer
from fedsafe_jax.federated.simulation import FederatedState
from fedsafe_jax.runtime.checkpoint import (
    CheckpointError,
    RoundCheckpoints,
    read_factors,
    rounds_of,
)

WORKER = pathlib.Path(__file__).with_name("checkpoint_worker.py")


def state(value):
    factors = {"q": {"a": jnp.full((2, 3), value), "b": jnp.zeros((3, 2))}}
    optimizer = adaptive(ADAM, Hyperparameters(adaptive_learning_rate=0.1))
    server = ServerState(factors, (), optimizer.init(factors))
    return FederatedState(server, {"states": {"c": np.full((5, 3), value)}, "residuals": ()})


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_newest_comes_back(tmp_path):
    saved = RoundCheckpoints(tmp_path)
    assert saved.restore(state(0.0))[1] == 0
    for t in (1, 2, 3):
        saved.save(t, state(float(t)))
    saved.save(3, state(9.0))  # this round is saved already: left alone
    saved.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3"]
    restored, done = RoundCheckpoints(tmp_path).restore(state(0.0))
    assert done == 3
    assert_same(restored, state(3.0))


def cut(folder, divisor):
    """Cuts every file of a checkpoint to its part of that divisor; None to nothing."""
    for file in [f for f in folder.rglob("*") if f.is_file()]:
        keep = file.stat().st_size // divisor if divisor else 0
        file.write_bytes(file.read_bytes()[:keep])


@pytest.mark.parametrize("damage", ["truncated", "emptied", "unfinished"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, caplog, damage):
    saved = RoundCheckpoints(tmp_path)
    for t in (1, 2):
        saved.save(t, state(float(t)))
    saved.close()
    newest = tmp_path / "2"
    if damage == "unfinished":  # as a kill in the middle of a write leaves it
        newest.rename(tmp_path / "2.orbax-checkpoint-tmp-1")
    else:
        cut(newest, 2 if damage == "truncated" else None)
    again = RoundCheckpoints(tmp_path)
    with caplog.at_level(logging.WARNING):
        restored, done = again.restore(state(0.0))
    assert done == 1
    assert_same(restored, state(1.0))
    assert damage == "unfinished" or "cannot be read" in caplog.text
    # Nothing is lost: what could not be read is still there, under another name.
    assert (tmp_path / "2.damaged").is_dir() == (damage != "unfinished")
    again.save(2, state(5.0))
    again.close()
    restored, done = RoundCheckpoints(tmp_path).restore(state(0.0))
    assert done == 2
    assert_same(restored, state(5.0))


def test_every_algorithms_state_is_stored(tmp_path):
    factors = {"q": {"a": jnp.ones((2, 3)), "b": jnp.zeros((3, 2))}}
    for name in algorithms.ALGORITHMS:
        method = algorithms.make(name, LocalTraining(None, make_optimizer()), 4)
        begun = method.init(factors)
        stepped = method.server_update(begun, factors, jax.tree.map(jnp.ones_like, begun.control))
        before = FederatedState(stepped, {"states": (), "residuals": np.ones((4, 2))})
        saved = RoundCheckpoints(tmp_path / name)
        saved.save(1, before)
        saved.close()
        assert_same(RoundCheckpoints(tmp_path / name).restore(before)[0], before)


def test_factors_alone_are_read_from_any_kept_round(tmp_path):
    assert rounds_of(tmp_path / "none") == []
    saved = RoundCheckpoints(tmp_path, keep=0)
    for t in range(1, 12):
        saved.save(t, state(float(t)))
        assert saved.rounds() == list(range(1, t + 1))
    saved.close()
    assert rounds_of(tmp_path) == list(range(1, 12))
    before = sorted(p.name for p in tmp_path.iterdir())
    like = jax.eval_shape(lambda: state(0.0).server.factors)
    for t in (1, 11):
        assert_same(read_factors(tmp_path, t, like), state(float(t)).server.factors)
    with pytest.raises(CheckpointError, match="shapes"):
        read_factors(tmp_path, 1, {"q": {"a": np.zeros((2, 9)), "b": np.zeros((3, 2))}})
    for file in [f for f in (tmp_path / "11").rglob("*") if f.is_file()]:
        file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_factors(tmp_path, 11, like)
    assert sorted(p.name for p in tmp_path.iterdir()) == before  # reading deletes nothing


@pytest.mark.parametrize(
    "error",
    [
        TimeoutError(110, "Connection timed out"),
        PermissionError(13, "Permission denied"),
        ValueError("UNAVAILABLE: Error reading gs://bucket/2/default/manifest.ocdbt"),
    ],
)
def test_storage_that_does_not_answer_costs_nothing(tmp_path, monkeypatch, error):
    saved = RoundCheckpoints(tmp_path)
    for t in (1, 2):
        saved.save(t, state(float(t)))
    saved.close()

    def fail(*args):
        raise error

    again = RoundCheckpoints(tmp_path)
    with monkeypatch.context() as patched, pytest.raises(CheckpointError) as raised:
        patched.setattr(again, "_read", fail)
        again.restore(state(0.0))
    assert f"{tmp_path}/2 cannot be reached, nothing is changed" in str(raised.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]
    restored, done = again.restore(state(0.0))  # the file system answers again
    assert done == 2
    assert_same(restored, state(2.0))


def test_what_is_damaged_twice_keeps_both(tmp_path):
    for _ in range(2):
        saved = RoundCheckpoints(tmp_path)
        saved.restore(state(0.0))
        saved.save(1, state(1.0))
        saved.close()
        cut(tmp_path / "1", None)
    assert RoundCheckpoints(tmp_path).restore(state(0.0))[1] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1.damaged", "1.damaged2"]


def two_processes(*folders, last=0):
    """What each of two processes says that resumes from its view of a folder."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, WORKER, str(i), str(port), str(folder), str(last)],
            env=os.environ | {"XLA_FLAGS": ""},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i, folder in enumerate(folders)
    ]  # fmt: skip
    answers = []
    for process in processes:
        out, errors = process.communicate(timeout=90)
        assert out, errors[-3000:]
        answers.append(out.splitlines()[-1])
    return answers


def test_two_processes_save_and_resume_the_same_round(tmp_path):
    shared = tmp_path / "shared"
    assert two_processes(shared, shared, last=2) == ["resumed 0 nothing"] * 2
    # One of the processes cannot read the newest; the other can, and the other way round.
    good, bad = tmp_path / "good", tmp_path / "bad"
    for folder in (good, bad):
        shutil.copytree(shared, folder)
    cut(bad / "2", None)
    assert two_processes(good, bad) == ["resumed 2 same"] * 2
    assert (bad / "2").is_dir()  # only the first process gives names
    assert two_processes(bad, good) == ["resumed 1 same"] * 2
    assert (bad / "2.damaged").is_dir() and (good / "2").is_dir()
    # What the first process cannot read is set aside for all, who go on from the round before.
    cut(shared / "2", 2)
    assert two_processes(shared, shared, last=3) == ["resumed 1 same"] * 2
    assert sorted(p.name for p in shared.iterdir()) == ["2", "2.damaged", "3"]
    # Both stop in one line, and nothing is changed, where the first gets no answer.
    assert two_processes(shared, f"{shared}?unreachable") == ["resumed 3 same"] * 2
    answers = two_processes(f"{shared}?unreachable", shared)
    assert answers[0].startswith("refused: checkpoint") and "Connection timed out" in answers[0]
    assert answers[1] == "refused: the first process could not read the checkpoints."
    assert sorted(p.name for p in shared.iterdir()) == ["2", "2.damaged", "3"]
