"""A stealthy attacker: updates of malicious clients have the median length of the honest ones.

Rules that look at lengths, such as clipping, cannot tell them apart. It is the length constraint
of "Can You Really Backdoor Federated Learning?" (Sun et al., 2019, arXiv 1911.07963), Section 4,
with the bound that the honest clients of the round set themselves.
"""

import jax
import jax.numpy as jnp

from fedsafe_jax.federated.attackers.base import Attacker


def to_median_length(updates: jax.Array, malicious: jax.Array, honest: jax.Array) -> jax.Array:
    """Scales malicious updates to the median length of the honest ones.

    Args:
      updates: float32 `[clients, params]`.
      malicious, honest: bool `[clients]`.

    Returns:
      Updates, float32 `[clients, params]`; as they were where no client is honest.
    """
    lengths = jnp.linalg.norm(updates, axis=1)
    ranked, count = jnp.sort(jnp.where(honest, lengths, jnp.inf)), jnp.sum(honest)
    median = 0.5 * (ranked[jnp.maximum((count - 1) // 2, 0)] + ranked[count // 2])
    scale = jnp.where(malicious & (count > 0), median / jnp.maximum(lengths, 1e-12), 1.0)
    return updates * scale[:, None]


SCALED = Attacker(float, to_median_length)
