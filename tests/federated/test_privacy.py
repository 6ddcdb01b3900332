"""Noise of the right size, and the accounting library's epsilon."""

import jax
import numpy as np
import pytest
from federation import SGD, make_federation

from fedsafe_jax.federated import privacy


def test_epsilon_is_the_librarys():
    accounting = pytest.importorskip("dp_accounting")
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    # Figures published with the library's version that they were made with.
    assert (
        abs(
            privacy.epsilon(100, 100, 10, noise_multiplier=1.0, delta=1e-5, sampling="poisson")
            - 7.05
        )
        < 0.01
    )
    assert (
        abs(
            privacy.epsilon(100, 100, 10, noise_multiplier=2.0, delta=1e-5, sampling="uniform")
            - 14.05
        )
        < 0.01
    )
    relation = accounting.NeighboringRelation
    poisson = PLDAccountant(relation.ADD_OR_REMOVE_ONE)
    event = accounting.GaussianDpEvent(1.3)
    poisson.compose(accounting.PoissonSampledDpEvent(0.25, event), 7)
    assert privacy.epsilon(
        7, 20, 5, noise_multiplier=1.3, delta=1e-6, sampling="poisson"
    ) == poisson.get_epsilon(1e-6)
    fixed = RdpAccountant(neighboring_relation=relation.REPLACE_ONE)
    # Replacing a client moves a sum of updates of length 1 by up to 2.
    event = accounting.GaussianDpEvent(1.3 / 2)
    fixed.compose(accounting.SampledWithoutReplacementDpEvent(20, 5, event), 7)
    assert (
        privacy.epsilon(7, 20, 5, noise_multiplier=1.3, delta=1e-6, sampling="uniform")
        <= fixed.get_epsilon(1e-6) * 1.001
    )


def test_updates_are_clipped_then_noised():
    federation = make_federation()
    ones, limit = np.ones(4, np.float32), 1e-3

    def moved(noise, key=0, weights=ones):
        spec = federation.spec("fedavg", SGD, clip_norm=limit, noise_multiplier=noise, cohort=4)
        state, report = federation.run(spec, rounds=1, weights=weights, key=key)
        start = np.concatenate([np.ravel(v) for v in jax.tree.leaves(federation.adapter)])
        end = np.concatenate([np.ravel(v) for v in jax.tree.leaves(state.server.factors)])
        return end - start, report

    bare, report = moved(1e-12)
    assert report.norms.min() > limit  # every client is clipped
    assert np.linalg.norm(bare) <= limit * 1.01
    # Half the cohort: the denominator stays the expected one.
    half, _ = moved(1e-12, weights=np.array([1, 1, 0, 0], np.float32))
    assert np.linalg.norm(half) <= limit / 2 * 1.01
    noise = np.concatenate([moved(2.0, key)[0] - bare for key in range(4)])
    # 4 x 896 draws: the deviation's relative standard error is 1 / sqrt(2 n), about 1.2%.
    assert abs(noise.std() / (2.0 * limit / 4) - 1) < 0.05
    assert not np.array_equal(moved(2.0, 1)[0], moved(2.0, 2)[0])
    np.testing.assert_array_equal(moved(2.0, 1)[0], moved(2.0, 1)[0])
    # Nobody came: noise alone, as privacy demands.
    empty, report = moved(2.0, weights=0 * ones)
    assert empty.std() > 0 and not report.skipped
