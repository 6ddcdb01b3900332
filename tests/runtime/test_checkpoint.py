"""Checkpoints: what was saved comes back to the bit, and damage costs one round, not the run."""

import logging

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
        for file in [f for f in newest.rglob("*") if f.is_file()]:
            size = file.stat().st_size if damage == "truncated" else 0
            file.write_bytes(file.read_bytes()[: size // 2])
    again = RoundCheckpoints(tmp_path)
    with caplog.at_level(logging.WARNING):
        restored, done = again.restore(state(0.0))
    assert done == 1
    assert_same(restored, state(1.0))
    assert damage == "unfinished" or "cannot be read" in caplog.text
    again.save(2, state(5.0))
    again.close()
    restored, done = RoundCheckpoints(tmp_path).restore(state(0.0))
    assert done == 2
    assert_same(restored, state(5.0))


def test_every_algorithms_state_is_stored(tmp_path):
    factors = {"q": {"a": jnp.ones((2, 3)), "b": jnp.zeros((3, 2))}}
    for name in algorithms.ALGORITHMS:
        method = algorithms.make(name, LocalTraining(None, make_optimizer()), 4)
        stepped = method.server_update(method.init(factors), factors, factors)
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
