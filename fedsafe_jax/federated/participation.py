"""Who takes part in a round: sampling, dropouts and stragglers, all from (seed, round)."""

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SAMPLINGS = ("uniform", "weighted", "poisson", "openfedllm")


class Cohort(NamedTuple):
    """The clients of a round that send an update.

    Attributes:
      ids: int32 `[clients]`, sorted.
      weights: float32 `[clients]`, of the aggregation.
      steps: int32 `[clients]`, local steps each gets done.
      dropped_out: ids that were sampled and never answered.
      no_data: ids that were sampled and hold no example.
    """

    ids: np.ndarray
    weights: np.ndarray
    steps: np.ndarray
    dropped_out: tuple[int, ...]
    no_data: tuple[int, ...]


def sample_ids(
    seed: int, round_number: int, sizes: Sequence[int], count: int, sampling: str = "uniform"
) -> tuple[np.ndarray, np.ndarray]:
    """Draws a round's clients.

    Args:
      seed, round_number: the draw depends on nothing else.
      sizes: examples of every client.
      count: clients a round; `poisson` only expects so many.
      sampling: `uniform`: without replacement. `weighted`: with replacement, in proportion to
        size, so that draws weigh the same (Li et al., 2020, Scheme I). `poisson`: every client on
        its own, as privacy accounting likes best. `openfedllm`: as that package, from the round
        number alone.

    Returns:
      Sorted ids int32 `[clients]`, and how often each was drawn.
    """
    num = len(sizes)
    if sampling == "openfedllm":
        chosen = random.Random(round_number).sample(range(num), min(count, num))
        return np.sort(np.array(chosen, np.int32)), np.ones(len(chosen), np.int64)
    rng = np.random.default_rng([seed, round_number, 0])
    if sampling == "weighted":
        if not sum(sizes):
            return np.zeros(0, np.int32), np.zeros(0, np.int64)
        share = np.asarray(sizes, np.float64) / max(sum(sizes), 1)
        ids, times = np.unique(rng.choice(num, count, p=share), return_counts=True)
        return ids.astype(np.int32), times
    if sampling == "poisson":
        ids = np.flatnonzero(rng.random(num) < count / num)
    else:
        ids = np.sort(rng.choice(num, count, replace=False))
    return ids.astype(np.int32), np.ones(len(ids), np.int64)


def draw_cohort(
    seed: int,
    round_number: int,
    sizes: Sequence[int],
    count: int,
    local_steps: int,
    sampling: str = "uniform",
    weighting: str = "examples",
    dropout: float = 0.0,
    stragglers: float = 0.0,
) -> Cohort:
    """A round's cohort.

    Args:
      seed, round_number, sizes, count, sampling: see `sample_ids`.
      local_steps: of a client that keeps up.
      weighting: `examples`: by size; `uniform`. Under `weighted` sampling draws count instead.
      dropout: probability that a sampled client never answers.
      stragglers: probability that one gets only 1 to `local_steps - 1` steps done.
    """
    ids, times = sample_ids(seed, round_number, sizes, count, sampling)
    held = np.array([sizes[i] for i in ids], np.float32)
    if sampling == "weighted":
        weights = times.astype(np.float32)
    else:
        weights = held if weighting == "examples" else np.ones(len(ids), np.float32)
    rng = np.random.default_rng([seed, round_number, 6])
    gone = rng.random(len(ids)) < dropout
    slow = rng.random(len(ids)) < stragglers
    fewer = rng.integers(1, max(local_steps, 2), len(ids))
    steps = np.where(slow & (local_steps > 1), fewer, local_steps).astype(np.int32)
    empty = (held == 0) & ~gone
    left = ~gone & ~empty
    return Cohort(
        ids[left],
        weights[left],
        steps[left],
        dropped_out=tuple(ids[gone].tolist()),
        no_data=tuple(ids[empty].tolist()),
    )


def malicious_clients(seed: int, num_clients: int, share: float) -> tuple[int, ...]:
    """Ids of the clients that are malicious in a run, the same in every round."""
    rng = np.random.default_rng([seed, 8])
    count = round(share * num_clients)
    return tuple(sorted(rng.choice(num_clients, count, replace=False).tolist()))
