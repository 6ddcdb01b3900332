"""Correlated noise: its covariance, its accounting, and audits of what is claimed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from federation import SGD, make_federation
from jax.flatten_util import ravel_pytree

from fedsafe_jax.config import ConfigError, default_config
from fedsafe_jax.federated import lora_average, privacy, simulation
from fedsafe_jax.federated.mesh import make_mesh
from fedsafe_jax.federated.participation import sample_ids
from fedsafe_jax.federated.round_programs import PartialSum, make_round
from fedsafe_jax.random_streams import Purpose, key
from fedsafe_jax.validation import validate

ROUNDS, BANDS, CLIP = 6, 3, 1e-2


def test_groups_of_clients_take_turns():
    drawn = np.zeros((300, 20), bool)
    for t in range(300):
        ids, _ = sample_ids(3, t, [1] * 20, count=4, sampling="poisson", groups=3)
        assert all(i % 3 == t % 3 for i in ids)
        drawn[t, ids] = True
    # 4 of groups of 6 or 7: each is drawn two thirds of its 100 turns; five standard errors.
    assert np.all(np.abs(drawn.sum(0) / 100 - 4 / 6) < 5 * np.sqrt(2 / 9 / 100))


def test_epsilon_is_that_of_jax_privacy():
    pytest.importorskip("jax_privacy")
    from jax_privacy.accounting import accountants, analysis

    accountant = analysis.DpsgdTrainingAccountant(accountants.PldAccountantConfig())
    for rounds, bands in ((50, 5), (7, 3), (10, 1)):
        wanted = accountant.compute_epsilon(
            rounds,
            analysis.DpParams(
                noise_multipliers=1.3, num_samples=100, delta=1e-5, batch_size=10,
                cycle_length=bands,
            ),
        )  # fmt: skip
        said = privacy.epsilon(
            rounds, 100, 10, noise_multiplier=1.3, delta=1e-5, sampling="poisson", bands=bands
        )
        assert said == pytest.approx(wanted, rel=1e-3)


def test_rows_invert_a_matrix_whose_columns_have_length_one():
    pytest.importorskip("jax_privacy")
    inverse = np.stack([privacy.noising_row(12, 4, t) for t in range(12)]).astype(np.float64)
    matrix = np.linalg.inv(inverse)
    assert np.abs(np.tril(matrix, -4)).max() < 1e-6 and np.abs(np.triu(matrix, 1)).max() == 0
    assert np.linalg.norm(matrix, axis=0).max() < 1 + 1e-6
    # What a model has summed up of it by each round: less than of independent noise.
    summed = np.linalg.norm(np.tril(np.ones((12, 12))) @ inverse, axis=1)
    assert summed.mean() < 0.8 * np.sqrt(np.arange(1, 13)).mean()


def test_noise_of_rounds_has_the_covariance_of_the_rows():
    pytest.importorskip("jax_privacy")
    rows = np.stack([privacy.noising_row(ROUNDS, BANDS, t) for t in range(ROUNDS)])

    def noise(row):
        zeros = jnp.zeros(40_000)
        return privacy.add_correlated_noise(zeros, key(Purpose.NOISE, 1), row, deviation=1.0)

    drawn = np.asarray(jax.vmap(noise)(jnp.asarray(rows)))
    # Variances up to 2: a covariance of 40,000 draws has a standard error of at most 0.015.
    np.testing.assert_allclose(drawn @ drawn.T / 40_000, rows @ rows.T, atol=0.06)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling": "uniform"}, "sampling='poisson' alone"),
        ({"noise_bands": 7}, "at most rounds=6"),
        ({"noise_bands": 6}, "cannot give clients_per_round=5"),
        ({"noise_bands": 0}, "expected at least 1"),
        ({"noise_multiplier": 0.0}, "there is no noise"),
    ],
)
def test_epsilon_that_is_not_known_is_refused(changes, message):
    pytest.importorskip("jax_privacy")
    pytest.importorskip("dp_accounting")
    c = default_config()
    c.rounds, c.num_clients, c.clients_per_round = 6, 20, 5
    c.federated.update({"clip_norm": 1.0, "noise_multiplier": 1.0, "sampling": "poisson"})
    c.federated.noise_bands = 3
    validate(c)
    c.federated.update(changes)
    with pytest.raises(ConfigError, match=message):
        validate(c)


@pytest.mark.slow
@pytest.mark.parametrize("bands", [1, BANDS])
def test_an_audit_finds_less_than_is_claimed_and_more_without_noise(bands):
    """A client's update is looked for in what runs with it and runs without it release.

    The server's own program makes the steps. The attack knows all but the secret, and weighs the
    rounds as the likelihood ratio does.
    """
    auditing = pytest.importorskip("jax_privacy.auditing")
    federation, multiplier, runs = make_federation(), 3.0, 4000
    sums = PartialSum(
        jnp.zeros(sum(x.size for x in jax.tree.leaves(federation.adapter))),
        weight=jnp.float32(0),
        steps=jnp.float32(0),
        clients=jnp.float32(0),
        controls=(),
        products=jnp.zeros_like(lora_average.project_products(federation.adapter)),
    )
    size = sums.total.size
    canary = np.full(size, 1 / np.sqrt(size), np.float32)  # of length 1, before clipping
    rows = None
    if bands > 1:
        rows = np.stack([privacy.noising_row(ROUNDS, bands, t) for t in range(ROUNDS)])
    # The client is in every `bands`-th round, which is what epsilon without sampling claims.
    turns = np.arange(ROUNDS) % bands == 0
    whiten = np.eye(ROUNDS) if rows is None else np.linalg.inv(rows.astype(np.float64))
    weights = jnp.asarray(whiten.T @ whiten @ turns, jnp.float32)

    def bound(noise):
        spec = federation.spec("fedavg", SGD, clip_norm=CLIP, noise_multiplier=noise, cohort=1)
        programs = make_round(spec, make_mesh(jax.devices()[:1]))
        server = simulation.initial_state(programs, federation.adapter, 6).server

        def seen(root, t, row, here):
            own = jax.random.fold_in(root, t) if row is None else root
            total = sums._replace(total=here * CLIP * canary, weight=here, clients=here)
            stepped, _ = programs.finish(server, total, own, row)
            change = jax.tree.map(jnp.subtract, stepped.factors, server.factors)
            return ravel_pytree(change)[0] @ canary

        def score(root, here):
            each = jax.vmap(seen, (None, 0, None if rows is None else 0, 0))
            return weights @ each(root, jnp.arange(ROUNDS), rows, here * turns)

        scores = jax.jit(jax.vmap(score, (0, None)))
        inside, outside = (
            scores(jax.random.split(key(Purpose.NOISE, s), runs), jnp.float32(s)) for s in (1, 0)
        )
        auditor = auditing.CanaryScoreAuditor(inside, outside)
        return auditor.epsilon_clopper_pearson(0.05, delta=1e-5)

    claimed = privacy.epsilon(
        ROUNDS, bands, 1, noise_multiplier=multiplier, delta=1e-5, sampling="poisson", bands=bands
    )
    assert 0.1 < bound(multiplier) < claimed < bound(1e-3)
