"""Attackers that hide in the spread of the honest updates: `min_max` and `min_sum`.

"Manipulating the Byzantine" (Shejwalkar and Houmansadr, NDSS 2021), Sections IV-C and IV-D: all
malicious clients send the mean of the honest updates, moved as far along a direction as the
distances among the honest ones allow. The paper moves against the mean, to stop the training. Here
the direction is that of what the malicious clients have learned, so that the harm in their data
stays. The paper searches for the step; it is the root of a quadratic, and computed as that.
"""

import jax
import jax.numpy as jnp

from fedsafe_jax.federated.attackers.base import Attacker


def min_max(updates: jax.Array, malicious: jax.Array, honest: jax.Array) -> jax.Array:
    """Moves malicious updates until one honest update is as far as two honest ones are apart.

    Their greatest distance to an honest update is then the greatest between honest ones.

    Args:
      updates: float32 `[clients, params]`.
      malicious, honest: bool `[clients]`.

    Returns:
      Updates, float32 `[clients, params]`; as they were where no client is honest.
    """
    mean, direction, apart = _spread(updates, malicious, honest)
    limit = jnp.max(apart, where=honest[:, None] & honest, initial=0.0)
    offsets = mean - updates
    along, squared = offsets @ direction, jnp.sum(jnp.square(offsets), axis=1)
    steps = jnp.sqrt(jnp.maximum(jnp.square(along) + limit - squared, 0.0)) - along
    step = jnp.min(steps, where=honest, initial=jnp.inf)
    return _sent(updates, malicious, honest, mean + step * direction)


def min_sum(updates: jax.Array, malicious: jax.Array, honest: jax.Array) -> jax.Array:
    """Moves malicious updates until they are as far from the honest ones as any of these is.

    The distance is the sum of squared distances to all honest updates. Arguments and result as of
    `min_max`.
    """
    mean, direction, apart = _spread(updates, malicious, honest)
    sums = jnp.sum(apart, axis=1, where=honest)
    limit = jnp.max(sums, where=honest, initial=0.0)
    of_mean = jnp.sum(jnp.square(mean - updates), where=honest[:, None])
    # Distances along the direction cancel, as they are counted from the mean.
    step = jnp.sqrt(jnp.maximum(limit - of_mean, 0.0) / jnp.maximum(jnp.sum(honest), 1))
    return _sent(updates, malicious, honest, mean + step * direction)


def _spread(
    updates: jax.Array, malicious: jax.Array, honest: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns what both attackers are computed from.

    Returns:
      `(mean of the honest updates [params], unit direction from it to the mean of the malicious
      ones [params], squared distances of all updates [clients, clients])`.
    """
    mean = jnp.mean(updates, axis=0, where=honest[:, None])
    learned = jnp.mean(updates, axis=0, where=malicious[:, None]) - mean
    direction = learned / jnp.maximum(jnp.linalg.norm(learned), 1e-12)
    # Around the mean, where products are small beside what updates have in common.
    centred = updates - mean
    products = centred @ centred.T
    lengths = jnp.diag(products)
    return mean, direction, jnp.maximum(lengths[:, None] + lengths - 2 * products, 0.0)


def _sent(updates, malicious, honest, crafted):
    """Puts the crafted update in the place of all malicious ones."""
    replaced = malicious[:, None] & jnp.any(honest)
    return jnp.where(replaced, crafted, updates)


MIN_MAX, MIN_SUM = Attacker(float, min_max), Attacker(float, min_sum)
