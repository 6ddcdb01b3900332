"""Rounds that are not taken: too few clients count, or the step is not finite.

Nothing is trained: what clients send is given.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedsafe_jax.config import ConfigError, default_config
from fedsafe_jax.federated import aggregation, algorithms, simulation
from fedsafe_jax.federated.client import LocalTraining
from fedsafe_jax.federated.lora_average import project_products
from fedsafe_jax.federated.mesh import make_mesh
from fedsafe_jax.federated.participation import Cohort, capped, draw_cohort
from fedsafe_jax.federated.round_programs import (
    SKETCH,
    ClientMetrics,
    ClientUpdates,
    RoundSpec,
    make_round,
)
from fedsafe_jax.validation import validate

FACTORS = {"q": {"a": np.ones((1, 3, 2), np.float32), "b": np.ones((1, 2, 3), np.float32)}}
PARAMS, PRODUCTS = 12, jax.eval_shape(project_products, FACTORS).size
ROBUST = sorted(set(aggregation.AGGREGATORS) - {"mean"})


def run(updates, algorithm="fedavg", aggregator="mean", controls=None, weights=None, **spec):
    """`(state before, state after, report)` of a round in which clients send these updates."""
    count = len(updates)
    training = LocalTraining(lambda *args: 0.0, optax.sgd(1.0))
    made = algorithms.make(algorithm, training, num_clients=count)
    spec = RoundSpec(made, aggregation.make(aggregator, byzantine=1), **spec)
    programs = make_round(spec, make_mesh(jax.devices()[:1], 1))
    before = simulation.initial_state(programs, FACTORS, count)
    weights = np.ones(count, np.float32) if weights is None else np.asarray(weights, np.float32)

    def train(server, base, inputs, rates):
        del base, rates
        size, zeros = len(inputs.weights), np.zeros
        sent = zeros((size, PARAMS), np.float32)
        sent[:count] = updates
        change = jax.tree.map(lambda x: zeros((size, *x.shape), np.float32), server.control)
        if controls is not None:
            change = jax.tree.map(lambda x: x + np.float32(controls), change)
        steps, products = np.ones(size, np.float32), zeros((size, PRODUCTS), np.float32)
        states = jax.tree.map(lambda x: x + 1, inputs.states)
        metrics = ClientMetrics(
            zeros((size, 1), np.float32), zeros((size, 1), np.float32), zeros(size, np.float32),
            finite=np.ones(size, bool), sketches=zeros((size, SKETCH), np.float32),
        )  # fmt: skip
        weights = np.asarray(inputs.weights)
        sent = ClientUpdates(sent, (), change, weights=weights, steps=steps, products=products)
        return sent, states, (), metrics

    ids = np.arange(count, dtype=np.int32)
    cohort = Cohort(ids, weights, np.ones(count, np.int32), dropped_out=(), no_data=())
    after, report = simulation.run_round(
        programs._replace(train=train),
        before,
        base=None,
        batches=lambda start, stop: np.zeros(stop - start),
        cohort=cohort,
        rates=[1.0],
        chunk=count,
    )
    return before, after, report


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("aggregator", sorted(aggregation.AGGREGATORS))
def test_a_round_with_too_few_answers_is_skipped(aggregator):
    need = max(aggregation.make(aggregator, byzantine=1).min_clients, 2)
    assert need == {"mean": 2, "krum": 5, "multi_krum": 5}.get(aggregator, 3)
    updates = np.full((need, PARAMS), 0.5, np.float32)
    for answers in range(need + 1):
        weights = np.arange(need) < answers
        before, after, report = run(
            updates, aggregator=aggregator, weights=weights, min_answers=need
        )
        if answers < need:
            same(after, before)
            assert report.skipped and report.update_norm == 0
            few = f"{answers} counted, fewer than min_answers={need}"
            assert report.skipped_because == (few if answers else "no client was left")
        else:
            assert not report.skipped and report.skipped_because == ""
            moved = after.server.factors["q"]["a"] - before.server.factors["q"]["a"]
            np.testing.assert_allclose(moved, 0.5, atol=1e-6)


@pytest.mark.parametrize("byzantine", [1, 2, 3])
@pytest.mark.parametrize("aggregator", ROBUST)
def test_what_an_aggregator_needs_is_what_its_bound_needs(aggregator, byzantine):
    """With one client less, as many malicious ones move the rule as far as they like."""
    rule = aggregation.make(aggregator, trim_share=0.1, byzantine=byzantine)

    def farthest(count):
        honest = np.linspace(-1, 1, (count - byzantine) * 2).reshape(-1, 2)
        updates = np.concatenate([honest, np.full((byzantine, 2), 1e4)]).astype(np.float32)
        ones = jnp.ones(count)
        return np.abs(rule.combine(jnp.asarray(updates), ones, jnp.zeros(2))).max()

    assert farthest(rule.min_clients) <= 10
    if "krum" not in aggregator:  # its bound is a sufficient condition
        assert farthest(rule.min_clients - 1) > 100


@pytest.mark.parametrize(
    ("algorithm", "value"), [("fedavg", 3e38), ("fedadam", 3e38), ("fedadagrad", 1e30)]
)
def test_a_step_that_is_not_finite_is_not_taken(algorithm, value):
    """Each update is finite, as it may be when it comes from elsewhere; the step is not."""
    updates = np.full((2, PARAMS), value, np.float32)
    before, after, report = run(updates, algorithm)
    assert report.skipped and report.skipped_because.startswith("the step is not finite")
    same(after, before)
    assert report.update_norm == 0 and np.isfinite(report.cosines).all()


def test_a_control_variate_that_is_not_finite_stops_the_whole_step():
    before, after, report = run(
        np.full((2, PARAMS), 0.1, np.float32), algorithm="scaffold", controls=3e38
    )
    assert report.skipped and "not finite" in report.skipped_because
    same(after, before)  # clients' own states as well
    _, after, report = run(
        np.full((2, PARAMS), 0.1, np.float32), algorithm="scaffold", controls=1.0
    )
    assert not report.skipped
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, 1.0), after.clients["states"])


def test_dropouts_of_a_simulation_count_as_missing_answers():
    cohort = draw_cohort(0, 3, [10] * 5, count=5, local_steps=1, dropout=0.6)
    assert 0 < len(cohort.ids) < 5
    weights = np.isin(np.arange(5), cohort.ids)
    updates = np.ones((5, PARAMS), np.float32)
    _, _, report = run(updates, aggregator="krum", weights=weights, min_answers=5)
    assert report.skipped


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_answers": 6}, "min_answers=6: expected 1, what the bound of aggregator='mean'"),
        ({"min_answers": 4, "aggregator": "krum"}, "min_answers=4: expected 5, what the bound"),
        ({"aggregator": "median", "byzantine": 3}, "needs at least 7 clients a round"),
        (
            {"min_answers": 2, "noise_multiplier": 1.0, "clip_norm": 1.0, "sampling": "poisson"},
            "min_answers=2 does not go with noise_multiplier",
        ),
    ],
)
def test_answers_that_no_round_can_have_are_refused(changes, message):
    c = default_config()
    c.federated.update(changes)
    with pytest.raises(ConfigError) as error:
        validate(c)
    assert message in str(error.value)
    c = default_config()
    c.federated.update({"aggregator": "krum", "min_answers": 5})
    validate(c)


def test_claimed_sizes_are_capped():
    assert capped([10, 12, 0, 1e9]) == [10, 12, 0, 24]
    assert capped([0, 0]) == [0, 0] and capped([5.0]) == [5.0]
    assert capped([10, 20]) == [10, 20]
