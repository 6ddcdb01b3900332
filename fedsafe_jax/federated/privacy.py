"""User-level differential privacy: noise on the mean of clipped updates, and its epsilon.

Every update is clipped to `clip_norm`, all weigh the same, and the sum is divided by the expected
cohort, not by the actual one ("Learning Differentially Private Recurrent Language Models", McMahan
et al., 2018, arXiv 1710.06963). Noise of standard deviation `noise_multiplier * clip_norm` is added
to the sum.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def add_noise(
    mean: jax.Array, key: jax.Array, noise_multiplier: float, clip_norm: float, cohort: int
) -> jax.Array:
    """Adds Gaussian noise to a flat mean, float32 `[params]`.

    Args:
      mean: sum of the clipped updates, divided by `cohort`.
      key: random key of the round.
      noise_multiplier: standard deviation of the noise on the sum, over `clip_norm`.
      clip_norm: greatest length of an update.
      cohort: expected number of clients.
    """
    deviation = noise_multiplier * clip_norm / cohort
    return mean + deviation * jax.random.normal(key, mean.shape, jnp.float32)


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
) -> float:
    """Returns the epsilon spent after `rounds`, by the `dp_accounting` library.

    Args:
      rounds: finished rounds.
      num_clients, clients_per_round: population and (expected) cohort.
      noise_multiplier: standard deviation of the noise on the sum, over `clip_norm`.
      delta: the delta of (epsilon, delta)-differential privacy.
      sampling: a name in `ACCOUNTANTS`.
    """
    accountant, event = ACCOUNTANTS[sampling](num_clients, clients_per_round, noise_multiplier)
    accountant.compose(event, rounds)
    return float(accountant.get_epsilon(delta))
