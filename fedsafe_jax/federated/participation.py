"""Who takes part in a round: sampling, dropouts and stragglers, all from (seed, round)."""

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fedsafe_jax.random_streams import Purpose, generator


class Cohort(NamedTuple):
    """The clients of a round that send an update.

    Attributes:
      ids: int32 `[clients]`, sorted.
      weights: float32 `[clients]`, weights in the aggregation.
      steps: int32 `[clients]`, local steps that each client gets done.
      dropped_out: ids that were sampled and never answered.
      no_data: ids that were sampled and have nothing to learn: no example, or masked ones alone.
      unlearned: ids that were sampled and are excluded from the run, whatever they hold.
    """

    ids: np.ndarray
    weights: np.ndarray
    steps: np.ndarray
    dropped_out: tuple[int, ...]
    no_data: tuple[int, ...]
    unlearned: tuple[int, ...] = ()


class Sampling(NamedTuple):
    """A way to sample the clients of a round.

    Attributes:
      draw: `(seed, round_number, sizes, count, groups) -> (sorted ids int32 [clients], times
        drawn)`; it depends on nothing else.
      weigh_by_draws: whether clients weigh in the aggregation as often as they were drawn, in place
        of their weighting.
      example_order: how the sampled clients take their examples, a name in `data.batches.ORDERS`.
    """

    draw: Callable
    weigh_by_draws: bool = False
    example_order: str = "shuffle"


def _once(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return ids.astype(np.int32), np.ones(len(ids), np.int64)


def _uniform(seed: int, round_number: int, sizes: Sequence[float], count: int, groups: int):
    """Draws `count` clients without replacement."""
    del groups
    rng = generator(Purpose.COHORT, seed, round_number)
    return _once(np.sort(rng.choice(len(sizes), count, replace=False)))


def _weighted(seed: int, round_number: int, sizes: Sequence[float], count: int, groups: int):
    """Draws with replacement, in proportion to size (Li et al., 2020, arXiv 1907.02189, Scheme I).

    Clients with more data are drawn more often, so that every draw weighs the same.
    """
    del groups
    if not sum(sizes):
        return np.zeros(0, np.int32), np.zeros(0, np.int64)
    share = np.asarray(sizes, np.float64) / sum(sizes)
    draws = generator(Purpose.COHORT, seed, round_number).choice(len(sizes), count, p=share)
    ids, times = np.unique(draws, return_counts=True)
    return ids.astype(np.int32), times


def _poisson(seed: int, round_number: int, sizes: Sequence[float], count: int, groups: int):
    """Draws each client independently, `count` in expectation; its privacy bound is tightest.

    With several groups, a client's number modulo their number, the groups take turns.
    """
    rng = generator(Purpose.COHORT, seed, round_number)
    drawn = rng.random(len(sizes)) < count / (len(sizes) // groups)
    return _once(np.flatnonzero(drawn & (np.arange(len(sizes)) % groups == round_number % groups)))


def _openfedllm(seed: int, round_number: int, sizes: Sequence[float], count: int, groups: int):
    """Draws as OpenFedLLM does (Ye et al., 2024, arXiv 2402.06954): from the round number alone."""
    del seed, groups
    chosen = random.Random(round_number).sample(range(len(sizes)), min(count, len(sizes)))
    return _once(np.sort(np.array(chosen, np.int32)))


SAMPLINGS: dict[str, Sampling] = {
    "uniform": Sampling(_uniform),
    "weighted": Sampling(_weighted, weigh_by_draws=True),
    "poisson": Sampling(_poisson),
    "openfedllm": Sampling(_openfedllm, example_order="openfedllm"),
}

# `what clients learn from, float32 [clients] -> weights, float32 [clients]` by name.
WEIGHTINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "examples": lambda held: held,
    "uniform": np.ones_like,
    "product_norm": np.ones_like,  # times the length of what each adapter does, once it is known
}


def sample_ids(
    seed: int,
    round_number: int,
    sizes: Sequence[float],
    count: int,
    sampling: str = "uniform",
    groups: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Draws a round's clients.

    Args:
      seed, round_number: seed of the run and number of the round; the draw depends on nothing else.
      sizes: what every client learns from: the sum of its examples' weights, their number where
        all weigh 1.
      count: clients a round; under `poisson` their expected number.
      sampling: a name in `SAMPLINGS`.
      groups: groups of clients that are sampled in turn, under `poisson`.

    Returns:
      Sorted ids int32 `[clients]`, and how often each was drawn.
    """
    return SAMPLINGS[sampling].draw(seed, round_number, sizes, count, groups)


def draw_cohort(
    seed: int,
    round_number: int,
    sizes: Sequence[float],
    count: int,
    local_steps: int,
    sampling: str = "uniform",
    weighting: str = "examples",
    dropout: float = 0.0,
    stragglers: float = 0.0,
    groups: int = 1,
    exclude: Sequence[int] = (),
) -> Cohort:
    """Draws a round's cohort.

    Args:
      seed, round_number, sizes, count, sampling: see `sample_ids`.
      local_steps: steps of a client that keeps up.
      weighting: a name in `WEIGHTINGS`. Samplings that weigh by draws do not read it.
      dropout: probability that a sampled client never answers.
      stragglers: probability that a client gets only 1 to `local_steps - 1` steps done.
      groups: see `sample_ids`.
      exclude: ids whose slots stay empty, as when they drop out, so that all others draw what they
        draw without it: exact unlearning of these clients, by a replay of the run.
    """
    ids, times = sample_ids(
        seed, round_number, sizes, count=count, sampling=sampling, groups=groups
    )
    held = np.array([sizes[i] for i in ids], np.float32)
    weights = times if SAMPLINGS[sampling].weigh_by_draws else WEIGHTINGS[weighting](held)
    weights = weights.astype(np.float32)
    rng = generator(Purpose.ABSENCE, seed, round_number)
    gone = rng.random(len(ids)) < dropout
    slow = rng.random(len(ids)) < stragglers
    fewer = rng.integers(1, max(local_steps, 2), len(ids))
    steps = np.where(slow & (local_steps > 1), fewer, local_steps).astype(np.int32)
    unlearned = np.isin(ids, np.asarray(exclude, np.int32))
    gone &= ~unlearned
    empty = (held == 0) & ~gone & ~unlearned
    left = ~gone & ~empty & ~unlearned
    return Cohort(
        ids[left],
        weights[left],
        steps[left],
        dropped_out=tuple(ids[gone].tolist()),
        no_data=tuple(ids[empty].tolist()),
        unlearned=tuple(ids[unlearned].tolist()),
    )


def capped(sizes: Sequence[float], times: float = 2.0) -> list[float]:
    """Returns claimed sizes, none of them above `times` the median of those above 0.

    A client that claims any size so has at most `times` the weight of an ordinary one, as long as
    most are honest.

    Args:
      sizes: what every client says that it learns from.
      times: most of a size, in medians.
    """
    some = [size for size in sizes if size > 0]
    most = times * float(np.median(some)) if some else 0.0
    return [min(size, most) for size in sizes]


def malicious_clients(seed: int, num_clients: int, share: float) -> tuple[int, ...]:
    """Returns the ids of the clients that are malicious in a run, the same in every round."""
    rng = generator(Purpose.MALICIOUS, seed)
    count = round(share * num_clients)
    return tuple(sorted(rng.choice(num_clients, count, replace=False).tolist()))
