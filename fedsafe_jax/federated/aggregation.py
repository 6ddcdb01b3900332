"""Combining what clients send: the mean, and aggregators that bound what a few clients can do.

Updates are flat vectors, one row a client, in a matrix float32 `[clients, params]`; `weights`
float32 `[clients]` are non-negative, usually the number of examples, and 0 for a client that is to
be left out (padding, no data, not finite). Everything is jittable, also in who is left out. With
nobody left the result is zero.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

RFA_STEPS, RFA_SMOOTHING = 32, 1e-6  # each step halves an outlier's pull, or better


class Aggregator(NamedTuple):
    """How updates are combined.

    Attributes:
      linear: a weighted sum over clients divided by the sum of weights, so that chunks of clients
        can be added up without keeping their updates.
      combine: `(updates [clients, params], weights [clients], current [params]) -> [params]`;
        `current` is the global adapter.
    """

    linear: bool
    combine: Callable


def weighted_mean(updates: jax.Array, weights: jax.Array) -> jax.Array:
    """McMahan et al. (2017), Algorithm 1."""
    share = weights / jnp.maximum(jnp.sum(weights), 1e-12)
    return share @ jnp.where(weights[:, None] > 0, updates, 0.0)


def _ranked(updates, weights):
    """Every coordinate sorted over the clients that count (others last), and their number."""
    present = weights > 0
    return jnp.sort(jnp.where(present[:, None], updates, jnp.inf), axis=0), jnp.sum(present)


def median(updates: jax.Array, weights: jax.Array) -> jax.Array:
    """Coordinate-wise median (Yin et al., 2018, Definition 1); all who count weigh the same."""
    ranked, count = _ranked(updates, weights)
    low, high = ranked[jnp.maximum((count - 1) // 2, 0)], ranked[count // 2]
    return jnp.where(count > 0, 0.5 * (low + high), 0.0)


def trimmed_mean(updates: jax.Array, weights: jax.Array, share: float) -> jax.Array:
    """Coordinate-wise mean without the `share` lowest and highest values (Yin et al., 2018,
    Definition 2), rounded up to whole clients; all who count weigh the same."""
    ranked, count = _ranked(updates, weights)
    most = jnp.maximum(count - 1, 0) // 2
    cut = jnp.minimum(jnp.ceil(share * count).astype(jnp.int32), most)
    places = jnp.arange(ranked.shape[0])
    kept = (places >= cut) & (places < count - cut)
    total = jnp.sum(jnp.where(kept[:, None], ranked, 0.0), axis=0)
    return total / jnp.maximum(jnp.sum(kept), 1)


def krum_scores(updates: jax.Array, weights: jax.Array, byzantine: int) -> jax.Array:
    """Sum of squared distances to the `n - byzantine - 2` nearest others (Blanchard et al., 2017),
    float32 `[clients]`; infinite for clients that do not count."""
    present = weights > 0
    clean = jnp.where(present[:, None], updates, 0.0)
    # Differences, not inner products: those lose what near-equal updates differ in.
    distance = jax.lax.map(lambda row: jnp.sum(jnp.square(clean - row), axis=1), clean)
    itself = jnp.eye(len(weights), dtype=bool)
    distance = jnp.sort(jnp.where(present & ~itself, distance, jnp.inf), axis=1)
    near = jnp.arange(len(weights)) < jnp.maximum(jnp.sum(present) - byzantine - 2, 1)
    return jnp.where(present, jnp.sum(jnp.where(near, distance, 0.0), axis=1), jnp.inf)


def krum(updates: jax.Array, weights: jax.Array, byzantine: int, select: int = 1) -> jax.Array:
    """The mean of the `select` updates with the best score: Krum for 1, else multi-Krum.

    Args:
      updates, weights: see the module.
      byzantine: clients that may be malicious, f; the bound needs 2 f + 2 < n.
      select: m; 0 for all but `byzantine`.
    """
    scores, count = krum_scores(updates, weights, byzantine), jnp.sum(weights > 0)
    wanted = jnp.minimum(select, count) if select else jnp.maximum(count - byzantine, 1)
    place = jnp.argsort(jnp.argsort(scores))
    chosen = ((place < wanted) & (weights > 0)).astype(jnp.float32)
    return weighted_mean(updates, chosen)


def geometric_median(updates: jax.Array, weights: jax.Array) -> jax.Array:
    """Smoothed Weiszfeld iterations for the weighted geometric median (RFA, Pillutla et al.,
    2022, Algorithm 2)."""

    def closer(_, center):
        distance = jnp.sqrt(jnp.sum(jnp.square(updates - center), axis=1))
        return weighted_mean(updates, weights / jnp.maximum(distance, RFA_SMOOTHING))

    updates = jnp.where(weights[:, None] > 0, updates, 0.0)
    return jax.lax.fori_loop(0, RFA_STEPS, closer, weighted_mean(updates, weights))


def make(name: str, trim_share: float = 0.1, byzantine: int = 1) -> Aggregator:
    """The aggregator of a name in `AGGREGATORS`."""
    rules = {
        "mean": weighted_mean,
        "median": median,
        "trimmed_mean": lambda u, w: trimmed_mean(u, w, trim_share),
        "krum": lambda u, w: krum(u, w, byzantine),
        "multi_krum": lambda u, w: krum(u, w, byzantine, 0),
        "geometric_median": geometric_median,
    }
    rule = rules[name]
    return Aggregator(name == "mean", lambda updates, weights, current: rule(updates, weights))


AGGREGATORS = ("mean", "median", "trimmed_mean", "krum", "multi_krum", "geometric_median")


def clip(update: jax.Array, norm: jax.Array, most: float) -> jax.Array:
    """Shortens a flat update of Euclidean length `norm` to at most `most`."""
    return update * jnp.minimum(1.0, most / jnp.maximum(norm, 1e-12))
