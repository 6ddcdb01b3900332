"""Subtraction of a client's updates, against sums by hand."""

import jax
import numpy as np
import pytest

from fedsafe_jax.federated import unlearning

WEIGHTS = {0: 1.0, 2: 3.0, 5: 2.0}


def updates_of(seed, clients):
    rng = np.random.default_rng(seed)
    return {i: {"a": rng.normal(size=(2, 3)), "b": rng.normal(size=4)} for i in clients}


def mean(updates, weights):
    total = sum(weights[i] for i in updates)
    return {
        name: sum(weights[i] * u[name] for i, u in updates.items()) / max(total, 1e-30)
        for name in ("a", "b")
    }


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_what_is_left_is_the_mean_of_the_others(weights):
    start = {"a": np.ones((2, 3)), "b": np.zeros(4)}
    rounds = [updates_of(0, (0, 2, 5)), updates_of(1, (0, 5)), updates_of(2, (2,))]
    by = weights or dict.fromkeys(WEIGHTS, 1.0)

    def after(rounds):
        means = [mean(updates, by) for updates in rounds if updates]
        return jax.tree.map(lambda x, *moves: x + sum(moves), start, *means)

    without = [{i: u for i, u in updates.items() if i != 2} for updates in rounds]
    unlearned = unlearning.subtract(after(rounds), rounds, client=2, weights=weights)
    # Shares are rounded to float32, as the factors of a run are.
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), unlearned, after(without)
    )
    assert unlearning.distance(unlearned, after(without), after(rounds)) < 1e-6
    assert unlearning.distance(after(rounds), after(without), after(rounds)) == 1
    same = unlearning.subtract(start, rounds, client=7, weights=weights)
    jax.tree.map(np.testing.assert_array_equal, same, start)
