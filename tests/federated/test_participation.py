"""Sampling, dropouts, stragglers, and OpenFedLLM's draws."""

import numpy as np
import pytest

from fedsafe_jax.data.batches import draw_examples
from fedsafe_jax.federated.participation import draw_cohort, malicious_clients, sample_ids

SIZES = [10, 20, 30, 0, 40, 5, 5, 10]


def test_openfedllm_draws_its_clients_and_rows():
    def clients(t, n, m):
        return sample_ids(0, t, [1] * n, count=m, sampling="openfedllm")[0].tolist()

    assert [clients(t, 20, 2) for t in range(6)] == [
        [12, 13], [4, 18], [1, 2], [7, 18], [7, 9], [8, 19]
    ]  # fmt: skip
    assert [clients(t, 20, 5) for t in range(4)] == [
        [1, 8, 12, 13, 15], [2, 3, 4, 8, 18], [1, 2, 5, 11, 18], [4, 7, 11, 17, 18]
    ]  # fmt: skip
    assert draw_examples(1000, 0, 0, client=5, count=160, order="openfedllm")[:6] == [
        864,
        394,
        776,
        911,
        430,
        41,
    ]
    assert draw_examples(1000, 0, 1, client=5, count=160, order="openfedllm")[:6] == [
        137,
        582,
        867,
        821,
        782,
        64,
    ]
    assert len(draw_examples(3, 0, 0, client=0, count=10, order="openfedllm")) == 10


@pytest.mark.parametrize("sampling", ["uniform", "weighted", "poisson"])
def test_sampling_has_the_rates_it_names(sampling):
    count, rounds = 3, 4000
    found = np.zeros(len(SIZES))
    for t in range(rounds):
        ids, times = sample_ids(7, t, SIZES, count=count, sampling=sampling)
        assert np.all(np.diff(ids) > 0)
        assert sampling == "poisson" or times.sum() == count
        found[ids] += times
    expected = np.full(len(SIZES), count / len(SIZES))
    if sampling == "weighted":
        expected = count * np.array(SIZES) / sum(SIZES)
    # Five standard errors of a rate of at most 1 (weighted: of a mean of up to 3 draws).
    np.testing.assert_allclose(found / rounds, expected, atol=5 * np.sqrt(0.75 / rounds))


def test_cohorts_follow_from_seed_and_round():
    one = draw_cohort(1, 5, SIZES, count=6, local_steps=10, dropout=0.3, stragglers=0.5)
    again = draw_cohort(1, 5, SIZES, count=6, local_steps=10, dropout=0.3, stragglers=0.5)
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    other = draw_cohort(1, 6, SIZES, count=6, local_steps=10, dropout=0.3, stragglers=0.5)
    assert not np.array_equal(one.steps, other.steps) or not np.array_equal(one.ids, other.ids)


def test_everyone_sampled_is_accounted_for():
    gone = slow = 0
    for t in range(300):
        cohort = draw_cohort(0, t, SIZES, count=8, local_steps=10, dropout=0.25, stragglers=0.5)
        together = sorted([*cohort.ids, *cohort.dropped_out, *cohort.no_data])
        assert together == list(range(8))
        assert 3 not in cohort.ids  # holds nothing
        assert np.all((cohort.steps >= 1) & (cohort.steps <= 10))
        np.testing.assert_array_equal(cohort.weights, [SIZES[i] for i in cohort.ids])
        gone += len(cohort.dropped_out)
        slow += np.sum(cohort.steps < 10) / max(len(cohort.ids), 1)
    assert abs(gone / 2400 - 0.25) < 0.05 and abs(slow / 300 - 0.5) < 0.05


def test_weights():
    uniform = draw_cohort(0, 0, SIZES, count=8, local_steps=10, weighting="uniform")
    assert set(uniform.weights) == {1.0}
    drawn = draw_cohort(0, 0, SIZES, count=8, local_steps=10, sampling="weighted")
    assert drawn.weights.sum() == 8
    assert len(draw_cohort(0, 0, [0, 0], count=2, local_steps=10, sampling="weighted").ids) == 0


def test_malicious_clients_are_a_share():
    assert len(malicious_clients(0, 20, 0.3)) == 6 and malicious_clients(0, 20, 0.0) == ()
    assert malicious_clients(0, 20, 0.3) != malicious_clients(1, 20, 0.3)
