"""An algorithm and an aggregator of one file each, by name from the config to a round."""

import pathlib
import runpy

import jax
import numpy as np
import pytest
from federation import CLIENTS, SGD, STEPS, WEIGHTS, close, make_federation, sgd_by_hand
from jax.flatten_util import ravel_pytree

from fedsafe_jax.config import ConfigError, default_config
from fedsafe_jax.federated.aggregation import AGGREGATORS
from fedsafe_jax.federated.algorithms import ALGORITHMS, Algorithm, Hyperparameters
from fedsafe_jax.pipeline import rounds
from fedsafe_jax.validation import validate

ONES = np.ones(CLIENTS, np.float32)
RATES = [0.2] * STEPS  # High: rounding must be small beside what a client learns.


@pytest.fixture(scope="module")
def federation():
    return make_federation()


@pytest.fixture(autouse=True)
def toys():
    """Registers the toys for one test alone: other tests list the registries."""
    before = [(registry, dict(registry)) for registry in (ALGORITHMS, AGGREGATORS)]
    for name in ("toy_algorithm", "toy_aggregator"):
        runpy.run_path(str(pathlib.Path(__file__).with_name(f"{name}.py")))
    yield
    for registry, entries in before:
        registry.clear()
        registry.update(entries)


def toy_config(**changes):
    c = default_config()
    c.algorithms, c.federated.aggregator = ("toy_unit",), "toy_midrange"
    c.update_from_flattened_dict({name.replace("__", "."): x for name, x in changes.items()})
    return c


def test_toys_are_valid_by_name():
    validate(toy_config())
    with pytest.raises(ConfigError, match="Did you mean 'toy_unit'?"):
        validate(toy_config(algorithms=("toy_units",)))
    with pytest.raises(ConfigError, match="Did you mean 'toy_midrange'?"):
        validate(toy_config(federated__aggregator="toy_midrang"))


def test_what_an_entry_needs_is_checked():
    with pytest.raises(ConfigError, match="needs at least 2 clients a round"):
        validate(toy_config(clients_per_round=1))
    with pytest.raises(ConfigError, match="aggregator other than mean and client_ranks"):
        validate(toy_config(federated__client_ranks=(4, 8)))
    ALGORITHMS["toy_control"] = Algorithm(None, controls=True)
    with pytest.raises(ConfigError, match="algorithm toy_control, whose control variates"):
        validate(toy_config(algorithms=("toy_unit", "toy_control")))
    validate(toy_config(algorithms=("toy_control",), federated__aggregator="mean"))


def test_an_entry_says_how_clients_weigh():
    c, sizes = toy_config(num_clients=3, clients_per_round=3), [10, 20, 30]
    assert rounds.draw_cohort(c, "toy_unit", sizes, seed=0, t=0).weights.tolist() == [1, 1, 1]
    assert rounds.draw_cohort(c, "fedavg", sizes, seed=0, t=0).weights.tolist() == sizes
    c.federated.weighting = "examples"
    assert rounds.draw_cohort(c, "toy_unit", sizes, seed=0, t=0).weights.tolist() == sizes


def client_deltas(federation):
    """What each client learns in a round of SGD, `[clients, params]`, by a loop of gradients."""
    start = ravel_pytree(federation.adapter)[0]
    ends = [
        sgd_by_hand(federation, federation.adapter, client, rates=RATES)
        for client in range(CLIENTS)
    ]
    return np.asarray(start), np.stack([ravel_pytree(end)[0] - start for end in ends])


def test_the_toy_algorithm_takes_its_step(federation):
    hyperparameters = Hyperparameters(adaptive_learning_rate=0.2)
    spec = federation.spec("toy_unit", SGD, hyperparameters=hyperparameters)
    state, report = federation.run(spec, rounds=1, rates=RATES, weights=ONES)
    start, deltas = client_deltas(federation)
    mean = deltas.mean(0)
    moved = ravel_pytree(jax.device_get(state.server.factors))[0]
    # The mean's length is about 0.02, so that its rounding, some 1e-8, counts tenfold.
    np.testing.assert_allclose(moved, start + 0.2 * mean / np.linalg.norm(mean), atol=1e-6)
    assert abs(report.update_norm - 0.2) < 1e-6


def test_the_toy_aggregator_combines_a_round(federation):
    spec = federation.spec("fedavg", SGD, aggregator="toy_midrange")
    state, _ = federation.run(spec, rounds=1, rates=RATES)
    start, deltas = client_deltas(federation)
    deltas = deltas[WEIGHTS > 0]
    expected = start + (deltas.min(0) + deltas.max(0)) / 2
    moved = ravel_pytree(jax.device_get(state.server.factors))[0]
    np.testing.assert_allclose(moved, expected, atol=1e-6)
    # Two chunks of clients are combined as one.
    close(federation.run(spec, rounds=1, rates=RATES, chunk=2)[0].server, state.server, atol=1e-6)
