"""Combining client deltas."""

import jax
import jax.numpy as jnp


def weighted_mean(deltas, weights: jax.Array):
    """Mean over the leading client axis (McMahan et al., 2017, Algorithm 1).

    Args:
      deltas: pytree with leaves `[clients, ...]`.
      weights: float32 `[clients]`, non-negative; usually the number of kept examples. When they sum
        to zero the mean is zero, so that a round in which every example was filtered changes
        nothing.
    """
    share = weights / jnp.maximum(jnp.sum(weights), 1e-12)
    return jax.tree.map(lambda d: jnp.tensordot(share, d, axes=1), deltas)


def global_norm(tree) -> jax.Array:
    """Euclidean norm of all leaves together, float32 scalar."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))
