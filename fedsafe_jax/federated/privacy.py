"""User-level differential privacy: noise on the mean of clipped updates, and its epsilon.

Every update is clipped to `clip_norm`, all weigh the same, and the sum is divided by the expected
cohort, not by the actual one (McMahan et al., 2018). Noise of standard deviation
`noise_multiplier * clip_norm` is added to the sum.
"""

import functools

import jax
import jax.numpy as jnp


def add_noise(mean: jax.Array, key, noise_multiplier: float, clip_norm: float, cohort: int):
    """Gaussian noise on a flat mean over `cohort` clients, `[params]`."""
    deviation = noise_multiplier * clip_norm / cohort
    return mean + deviation * jax.random.normal(key, mean.shape, jnp.float32)


@functools.cache
def epsilon(
    rounds: int,
    num_clients: int,
    clients_per_round: int,
    noise_multiplier: float,
    delta: float,
    sampling: str,
) -> float:
    """The epsilon spent after `rounds`, by the accounting library.

    Args:
      rounds: finished.
      num_clients, clients_per_round: population and (expected) cohort.
      noise_multiplier: standard deviation of the noise on the sum, over `clip_norm`.
      delta: of (epsilon, delta)-differential privacy.
      sampling: `poisson`: a client is added or removed, accounted by privacy loss distributions.
        `uniform`: cohorts of fixed size, a client is replaced by another, by Renyi differential
        privacy. Replacing moves the sum by up to twice the clipping norm, so there the same noise
        counts half.
    """
    from dp_accounting import dp_event, privacy_accountant
    from dp_accounting.pld import pld_privacy_accountant
    from dp_accounting.rdp import rdp_privacy_accountant

    relation = privacy_accountant.NeighboringRelation
    if sampling == "poisson":
        accountant = pld_privacy_accountant.PLDAccountant(relation.ADD_OR_REMOVE_ONE)
        event = dp_event.PoissonSampledDpEvent(
            clients_per_round / num_clients, dp_event.GaussianDpEvent(noise_multiplier)
        )
    else:
        orders = [1 + i / 10 for i in range(1, 100)] + list(range(11, 129))
        accountant = rdp_privacy_accountant.RdpAccountant(orders, relation.REPLACE_ONE)
        event = dp_event.SampledWithoutReplacementDpEvent(
            num_clients, clients_per_round, dp_event.GaussianDpEvent(noise_multiplier / 2)
        )
    accountant.compose(event, rounds)
    return float(accountant.get_epsilon(delta))
