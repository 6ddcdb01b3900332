"""User-level differential privacy: noise on the mean of clipped updates, and its epsilon.

Every update is clipped to `clip_norm`, all weigh the same, and the sum is divided by the expected
cohort, not by the actual one ("Learning Differentially Private Recurrent Language Models", McMahan
et al., 2018, arXiv 1710.06963). Noise of standard deviation `noise_multiplier * clip_norm` is added
to the sum.

With `bands` above 1 the noise of a round undoes part of the noise of the rounds before it, so that
less of it adds up in the model at the same epsilon (banded matrix factorisation, Choquette-Choo et
al., 2023, arXiv 2306.08153). A client may then take part in every `bands`-th round at most.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

# What has no epsilon, said wherever one is printed.
NOT_PRIVATE = (
    "What the run records of clients is not private, and must not be published with it: losses, "
    "update lengths, cosines, product gaps, counts of tokens and who took part (metrics.jsonl, the "
    "report, logs), counts of their pairs and shares of harmful ones (results.json, the report), "
    "updates/, filter_scores/, and checkpoints/ with the secret and what clients keep."
)


def add_noise(mean: jax.Array, key: jax.Array, deviation: float) -> jax.Array:
    """Adds Gaussian noise to a flat mean, float32 `[params]`.

    Args:
      mean: sum of the clipped updates, divided by the expected number of clients.
      key: random key of the round.
      deviation: standard deviation of the noise of each number: `noise_multiplier * clip_norm` over
        the expected number of clients.
    """
    return mean + deviation * jax.random.normal(key, mean.shape, jnp.float32)


@functools.cache
def noising_row(rounds: int, bands: int, t: int) -> np.ndarray:
    """Returns the weights of all rounds' draws in the noise of round `t`, float32 `[rounds]`.

    It is row `t` of the inverse of a lower triangular Toeplitz matrix of `bands` diagonals and
    columns of length 1 at most, which `jax_privacy` optimises for the mean error of the model over
    all rounds.

    Args:
      rounds: rounds of the run.
      bands: diagonals; 1 draws each round's noise on its own.
      t: the round, from 0.
    """
    from jax_privacy.matrix_factorization import toeplitz

    if (rounds, bands) not in _INVERSES:
        coefficients = np.asarray(toeplitz.optimize_banded_toeplitz(rounds, bands), np.float64)
        # Columns are to be no longer than 1, also by what float32 rounds.
        coefficients /= np.linalg.norm(coefficients)
        column = np.zeros(rounds)
        column[:bands] = coefficients
        matrix = scipy.linalg.toeplitz(column, np.zeros(rounds))
        unit = np.eye(rounds)[0]
        _INVERSES[rounds, bands] = scipy.linalg.solve_triangular(matrix, unit, lower=True)
    row = np.zeros(rounds, np.float32)
    row[: t + 1] = _INVERSES[rounds, bands][t::-1]
    return row


def add_correlated_noise(
    mean: jax.Array, key: jax.Array, row: jax.Array, deviation: float
) -> jax.Array:
    """Adds Gaussian noise that is correlated over the rounds to a flat mean, float32 `[params]`.

    Args:
      mean: see `add_noise`.
      key: random key of the arm, the same in every round: the draws of earlier rounds are made
        again from it, so that nothing has to be kept.
      row: weights of the rounds' draws, from `noising_row`.
      deviation: as in `add_noise`, of the draws.
    """

    def add(t, total):
        return total + row[t] * jax.random.normal(jax.random.fold_in(key, t), mean.shape)

    # In the jitted step the row is traced, and jax_privacy's own adder takes constants alone.
    rounds = jnp.max(jnp.where(row != 0, jnp.arange(len(row)) + 1, 0))
    noise = jax.lax.fori_loop(0, rounds, add, jnp.zeros_like(mean))
    return mean + deviation * noise


def _uniform(num_clients: int, clients_per_round: int, noise_multiplier: float) -> tuple[Any, Any]:
    """Accounts cohorts of fixed size by Renyi differential privacy.

    Neighbours differ by a client that is replaced. Replacing moves the sum by up to twice the
    clipping norm, so that the same noise counts half.
    """
    from dp_accounting import dp_event, privacy_accountant
    from dp_accounting.rdp import rdp_privacy_accountant

    orders = [1 + i / 10 for i in range(1, 100)] + list(range(11, 129))
    accountant = rdp_privacy_accountant.RdpAccountant(
        orders, privacy_accountant.NeighboringRelation.REPLACE_ONE
    )
    return accountant, dp_event.SampledWithoutReplacementDpEvent(
        num_clients, clients_per_round, dp_event.GaussianDpEvent(noise_multiplier / 2)
    )


# First column of the inverse by (rounds, bands), which takes jax_privacy a second to find.
_INVERSES: dict[tuple[int, int], np.ndarray] = {}


def _poisson(num_clients: int, clients_per_round: int, noise_multiplier: float) -> tuple[Any, Any]:
    """Accounts clients that are drawn each on its own by privacy loss distributions.

    Neighbours differ by a client that is added or removed.
    """
    from dp_accounting import dp_event, privacy_accountant
    from dp_accounting.pld import pld_privacy_accountant

    accountant = pld_privacy_accountant.PLDAccountant(
        privacy_accountant.NeighboringRelation.ADD_OR_REMOVE_ONE
    )
    return accountant, dp_event.PoissonSampledDpEvent(
        clients_per_round / num_clients, dp_event.GaussianDpEvent(noise_multiplier)
    )


# `(num_clients, clients_per_round, noise_multiplier) -> (accountant, event of a round)` by the
# samplings that can be accounted.
ACCOUNTANTS: dict[str, Callable] = {"uniform": _uniform, "poisson": _poisson}


@functools.cache
def epsilon(
    rounds: int,
    num_clients: int,
    clients_per_round: int,
    noise_multiplier: float,
    delta: float,
    sampling: str,
    bands: int = 1,
) -> float:
    """Returns the epsilon spent after `rounds`, by the `dp_accounting` library.

    Args:
      rounds: finished rounds.
      num_clients, clients_per_round: population and (expected) cohort.
      noise_multiplier: standard deviation of the noise on the sum, over `clip_norm`.
      delta: the delta of (epsilon, delta)-differential privacy.
      sampling: a name in `ACCOUNTANTS`.
      bands: diagonals of correlated noise, with `sampling="poisson"`: each client belongs to one
        of as many groups, which are sampled in turn. The epsilon is that of independent noise in
        the rounds of one group (arXiv 2306.08153, Theorem 4).
    """
    group = num_clients // bands
    accountant, event = ACCOUNTANTS[sampling](group, clients_per_round, noise_multiplier)
    accountant.compose(event, -(-rounds // bands))
    return float(accountant.get_epsilon(delta))
