"""Combining what clients send: the mean, and aggregators that bound what a few clients can do.

Updates are flat vectors, one row a client, in a matrix float32 `[clients, params]`; `weights`
float32 `[clients]` are non-negative, usually the number of examples, and 0 for a client that is to
be left out (padding, no data, not finite). Every rule is jittable, also in who is left out. Where
every client is left out the result is zero.

The registry is `AGGREGATORS`. An aggregator from elsewhere is one more entry.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedsafe_jax.registry import look_up

RFA_STEPS, RFA_SMOOTHING = 32, 1e-6  # Each step at least halves the pull of an outlier.


class Aggregator(NamedTuple):
    """How updates are combined.

    Attributes:
      combine: `(updates [clients, params], weights [clients], current [params]) -> [params]`;
        `current` is the global factors.
      linear: whether `combine` is the mean by weight. Chunks of clients are then added up, without
        keeping their updates, and `combine` is not called.
      min_clients: fewest clients that count for which the bound of the rule holds; a round with
        fewer is skipped. 1 where the rule bounds nothing.
    """

    combine: Callable
    linear: bool = False
    min_clients: int = 1


@jax.default_matmul_precision("float32")
def weighted_mean(updates: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns the mean by weight, float32 `[params]` (FedAvg, McMahan et al., 2017, arXiv
    1602.05629, Algorithm 1)."""
    share = weights / jnp.maximum(jnp.sum(weights), 1e-12)
    return share @ jnp.where(weights[:, None] > 0, updates, 0.0)


def _ranked(updates: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns each coordinate's values in order, absent clients last, and how many count."""
    present = weights > 0
    return jnp.sort(jnp.where(present[:, None], updates, jnp.inf), axis=0), jnp.sum(present)


def median(updates: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns the coordinate-wise median, float32 `[params]` (Yin et al., 2018, arXiv 1803.01498,
    Definition 1); all clients that count weigh the same."""
    ranked, count = _ranked(updates, weights)
    low, high = ranked[jnp.maximum((count - 1) // 2, 0)], ranked[count // 2]
    return jnp.where(count > 0, 0.5 * (low + high), 0.0)


def trimmed_mean(updates: jax.Array, weights: jax.Array, share: float) -> jax.Array:
    """Returns the coordinate-wise mean without the lowest and highest values, float32 `[params]`
    (Yin et al., 2018, arXiv 1803.01498, Definition 2).

    Args:
      updates, weights: updates and weights of the clients, as the module says; all clients that
        count weigh the same.
      share: share of the values dropped at each end, rounded up to whole clients.
    """
    ranked, count = _ranked(updates, weights)
    most = jnp.maximum(count - 1, 0) // 2
    cut = jnp.minimum(jnp.ceil(share * count).astype(jnp.int32), most)
    places = jnp.arange(ranked.shape[0])
    kept = (places >= cut) & (places < count - cut)
    total = jnp.sum(jnp.where(kept[:, None], ranked, 0.0), axis=0)
    return total / jnp.maximum(jnp.sum(kept), 1)


def krum_scores(updates: jax.Array, weights: jax.Array, byzantine: int) -> jax.Array:
    """Returns each client's score, float32 `[clients]`; infinite for clients that do not count.

    It is the sum of squared distances to the `n - byzantine - 2` nearest of the other updates
    (Krum, Blanchard et al., 2017, arXiv 1703.02757).
    """
    present = weights > 0
    clean = jnp.where(present[:, None], updates, 0.0)
    # Distances come from differences: inner products cancel in float32 where updates are alike.
    distance = jax.lax.map(lambda row: jnp.sum(jnp.square(clean - row), axis=1), clean)
    itself = jnp.eye(len(weights), dtype=bool)
    distance = jnp.sort(jnp.where(present & ~itself, distance, jnp.inf), axis=1)
    near = jnp.arange(len(weights)) < jnp.maximum(jnp.sum(present) - byzantine - 2, 1)
    return jnp.where(present, jnp.sum(jnp.where(near, distance, 0.0), axis=1), jnp.inf)


def krum(updates: jax.Array, weights: jax.Array, byzantine: int, select: int = 1) -> jax.Array:
    """Returns the mean of the updates with the best scores, float32 `[params]`.

    Args:
      updates, weights: updates and weights of the clients, as the module says.
      byzantine: f, clients that may be malicious; the bound needs 2 f + 2 < n.
      select: m, updates in the mean: 1 is Krum, more is multi-Krum; 0 for all but `byzantine`.
    """
    scores, count = krum_scores(updates, weights, byzantine), jnp.sum(weights > 0)
    wanted = jnp.minimum(select, count) if select else jnp.maximum(count - byzantine, 1)
    place = jnp.argsort(jnp.argsort(scores))
    chosen = ((place < wanted) & (weights > 0)).astype(jnp.float32)
    return weighted_mean(updates, chosen)


def geometric_median(updates: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns the weighted geometric median, float32 `[params]`, by smoothed Weiszfeld iterations
    (RFA, Pillutla et al., 2022, arXiv 1912.13445, Algorithm 2)."""

    def closer(_, center):
        distance = jnp.sqrt(jnp.sum(jnp.square(updates - center), axis=1))
        return weighted_mean(updates, weights / jnp.maximum(distance, RFA_SMOOTHING))

    updates = jnp.where(weights[:, None] > 0, updates, 0.0)
    return jax.lax.fori_loop(0, RFA_STEPS, closer, weighted_mean(updates, weights))


def _make_mean(trim_share: float, byzantine: int) -> Aggregator:
    del trim_share, byzantine
    return Aggregator(lambda updates, weights, _: weighted_mean(updates, weights), linear=True)


def _make_by_majority(trim_share: float, byzantine: int, rule: Callable) -> Aggregator:
    """Returns the entry of a rule whose result lies among the honest as long as they are most.

    Its breakdown point is one half (Yin et al., 2018; Pillutla et al., 2022, Section 2).
    """
    del trim_share
    return Aggregator(
        lambda updates, weights, _: rule(updates, weights), min_clients=2 * byzantine + 1
    )


def _make_trimmed_mean(trim_share: float, byzantine: int) -> Aggregator:
    # All malicious values must be among those that are dropped at one end.
    most = 2 * byzantine + 1
    if trim_share:
        most = max(most, math.floor((byzantine - 1) / trim_share) + 1)
    return Aggregator(
        lambda updates, weights, _: trimmed_mean(updates, weights, trim_share),
        min_clients=most if trim_share else 1,
    )


def _make_krum(trim_share: float, byzantine: int, select: int) -> Aggregator:
    del trim_share
    return Aggregator(
        lambda updates, weights, _: krum(updates, weights, byzantine, select),
        min_clients=2 * byzantine + 3,
    )


# `(trim_share, byzantine) -> Aggregator` by name.
AGGREGATORS: dict[str, Callable[[float, int], Aggregator]] = {
    "mean": _make_mean,
    "median": functools.partial(_make_by_majority, rule=median),
    "trimmed_mean": _make_trimmed_mean,
    "krum": functools.partial(_make_krum, select=1),
    "multi_krum": functools.partial(_make_krum, select=0),
    "geometric_median": functools.partial(_make_by_majority, rule=geometric_median),
}


def make(name: str, trim_share: float = 0.1, byzantine: int = 1) -> Aggregator:
    """Returns the aggregator of a name in `AGGREGATORS`.

    Args:
      name: a key of `AGGREGATORS`.
      trim_share: share of the values that the trimmed mean drops at each end.
      byzantine: malicious clients that a robust rule is to withstand in a cohort; Krum also uses
        the number, for the others it says how many clients they need.

    Raises:
      UnknownNameError: there is no such aggregator.
    """
    return look_up(AGGREGATORS, name, "aggregator")(trim_share, byzantine)


def clip(update: jax.Array, norm: jax.Array, most: float) -> jax.Array:
    """Shortens a flat update `[params]` of Euclidean length `norm` to at most `most`."""
    return update * jnp.minimum(1.0, most / jnp.maximum(norm, 1e-12))
