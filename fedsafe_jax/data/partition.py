"""Partitions: how examples are split over the clients."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fedsafe_jax.data.examples import Example
from fedsafe_jax.data.shares import fit_sizes, possible_sizes, unsafe_counts


class PartitionError(ValueError):
    """The examples cannot be split as asked."""


def _iid(
    safe: Sequence[Example],
    order: np.ndarray,
    num_clients: int,
    alpha: float,
    rng: np.random.Generator,
) -> list[list[int]]:
    """Deals the shuffled examples round robin."""
    del safe, alpha, rng
    return [[int(j) for j in order[i::num_clients]] for i in range(num_clients)]


def _dirichlet(
    safe: Sequence[Example],
    order: np.ndarray,
    num_clients: int,
    alpha: float,
    rng: np.random.Generator,
) -> list[list[int]]:
    """Skews the clients' mixtures of sources and categories."""
    del order
    labels = [f"{example.source}/{example.category}" for example in safe]
    return dirichlet_groups(labels, num_clients, alpha, rng)


def _by_field(
    safe: Sequence[Example],
    order: np.ndarray,
    num_clients: int,
    alpha: float,
    rng: np.random.Generator,
    field: str,
) -> list[list[int]]:
    """Keeps the examples of one value of a field together."""
    del alpha
    values = sorted({getattr(example, field) for example in safe})
    if len(values) < num_clients:
        raise PartitionError(
            f"partition='{field}': {len(values)} values for {num_clients} clients; a client "
            "would be empty."
        )
    owner = {value: i % num_clients for i, value in enumerate(rng.permutation(values))}
    groups: list[list[int]] = [[] for _ in range(num_clients)]
    for j in order:
        groups[owner[getattr(safe[j], field)]].append(int(j))
    return groups


class Partition(NamedTuple):
    """A way to split the safe examples.

    Attributes:
      group: `(safe examples, shuffled indices, num_clients, alpha, rng) -> indices by client`.
      alike: whether any example may go to any client: what one client leaves over then goes to
        clients that lack some, and only the size of the whole pool limits what they hold.
    """

    group: Callable
    alike: bool = False


PARTITIONS: dict[str, Partition] = {
    "iid": Partition(_iid, alike=True),
    "dirichlet": Partition(_dirichlet),
    "user": Partition(functools.partial(_by_field, field="user")),
    "language": Partition(functools.partial(_by_field, field="language")),
    "category": Partition(functools.partial(_by_field, field="category")),
    "source": Partition(functools.partial(_by_field, field="source")),
}


def dirichlet_groups(
    labels: Sequence[str], num_clients: int, alpha: float, rng: np.random.Generator
) -> list[list[int]]:
    """Splits indices so that a label's examples follow Dirichlet(alpha) shares over the clients.

    This is the label-skewed split of Hsu et al. (2019, arXiv 1909.06335).

    Args:
      labels: label of each example.
      num_clients: clients to deal to.
      alpha: concentration; the smaller, the more the clients differ.
      rng: numpy generator.

    Returns:
      Indices of the examples by client.
    """
    groups: list[list[int]] = [[] for _ in range(num_clients)]
    for label in sorted(set(labels)):
        indices = rng.permutation([i for i, other in enumerate(labels) if other == label])
        shares = rng.dirichlet(np.full(num_clients, alpha))
        cuts = (np.cumsum(shares)[:-1] * len(indices)).astype(int)
        for group, part in zip(groups, np.split(indices, cuts), strict=True):
            group.extend(int(i) for i in part)
    return groups


def client_sizes(num_clients: int, mean: int, sigma: float, rng: np.random.Generator) -> list[int]:
    """Returns the number of examples that each client holds, at least 1.

    Args:
      num_clients: clients to deal to.
      mean: mean of the numbers.
      sigma: standard deviation of their logarithm, which is normal; 0 for equal numbers.
      rng: numpy generator.
    """
    if not sigma:
        return [mean] * num_clients
    spread = np.exp(sigma * rng.standard_normal(num_clients) - sigma**2 / 2)
    return [max(1, round(mean * s)) for s in spread]


def partition(
    safe: Sequence[Example],
    unsafe: Sequence[Example],
    sizes: Sequence[int],
    harmful_shares: Sequence[float],
    kind: str,
    rng: np.random.Generator,
    alpha: float = 0.5,
) -> list[list[Example]]:
    """Deals examples to clients, each with its share of unsafe ones.

    Where a pool, or a client's part of it, is too small, clients hold fewer examples in the same
    shares, see `fit_sizes`. A client's count of unsafe examples is less than one off its share, and
    the sum over clients at most half an example off theirs, see `unsafe_counts`.

    Args:
      safe, unsafe: safe and unsafe examples, the two pools.
      sizes: examples that each client holds, at most.
      harmful_shares: share of unsafe examples at each client, in [0, 1].
      kind: a name in `PARTITIONS`: `iid`; `dirichlet` (safe examples skewed by source and
        category); `user`, `language`, `category` or `source` (the safe examples of one value of
        that field stay together).
      rng: numpy generator.
      alpha: concentration for `dirichlet`.

    Returns:
      The examples of each client, in a random order.

    Raises:
      PartitionError: an unknown kind, no example of a label that is asked for, too few examples, or
        an empty client; it names numbers that would do.
    """
    if kind not in PARTITIONS:
        raise PartitionError(f"partition='{kind}': expected {', '.join(PARTITIONS)}.")
    num_clients, shares = len(sizes), list(harmful_shares)
    asked = sum(n * h for n, h in zip(sizes, shares, strict=True)) / sum(sizes)
    for name, pool, need in (("safe", safe, 1 - asked), ("unsafe", unsafe, asked)):
        if need > 0 and not pool:
            raise PartitionError(
                f"{need:.1%} of the clients' pairs ought to be {name}, but there is no {name} pair"
                f": name some in {name}_sources, or set harmful_share (and attack.harmful_share) "
                f"to {int(name == 'safe')}."
            )
    mean = max(round(sum(sizes) / num_clients), 1)
    instead = possible_sizes(len(safe), len(unsafe), asked, num_clients=num_clients, examples=mean)
    there = (
        f"num_clients={num_clients}, harmful share {asked:.1%}: there are {len(safe)} safe and "
        f"{len(unsafe)} unsafe pairs"
    )
    wanted = unsafe_counts(sizes, shares, sum(sizes), sum(sizes)) or []
    for pool, need in (
        (unsafe, sum(u > 0 for u in wanted)),
        (safe, sum(n > u for n, u in zip(sizes, wanted, strict=True))),
    ):
        if len(pool) < need:
            raise PartitionError(f"{there}, more clients than examples; {instead} would do.")
    order = rng.permutation(len(safe))
    split = PARTITIONS[kind]
    groups = split.group(safe, order, num_clients, alpha, rng)
    limits = None if split.alike else [len(group) for group in groups]
    fitted = fit_sizes(sizes, shares, len(safe), len(unsafe), safe_by_client=limits)
    if empty := [i for i, n in enumerate(fitted) if not n]:
        more = f"partition='{kind}' leaves it no safe pair" if limits else "no pair is left for it"
        raise PartitionError(
            f"{there}; client {empty[0]} of {len(empty)} such client(s) would have no example: "
            f"{more}. Use a partition that is less skewed (dirichlet_alpha, partition='iid'), or "
            f"add data; {instead} would do for 'iid'."
        )
    num_unsafe = unsafe_counts(fitted, shares, len(safe), len(unsafe))
    num_safe = [n - u for n, u in zip(fitted, num_unsafe, strict=True)]
    harmful = rng.permutation(len(unsafe))
    holders = [i for i, n in enumerate(num_unsafe) if n]
    turns = {i: harmful[k :: len(holders)] for k, i in enumerate(holders)}
    dealt = _take([turns.get(i, ()) for i in range(num_clients)], num_unsafe)
    kept = _take(groups, num_safe)
    clients = []
    for mine_safe, mine_unsafe in zip(kept, dealt, strict=True):
        mine = [safe[j] for j in mine_safe] + [unsafe[j] for j in mine_unsafe]
        clients.append([mine[j] for j in rng.permutation(len(mine))])
    return clients


def _take(groups: Sequence[Sequence[int]], counts: Sequence[int]) -> list[list[int]]:
    """Takes counts from groups; who has too few gets what the others leave."""
    taken = [[int(j) for j in group[:n]] for group, n in zip(groups, counts, strict=True)]
    left = iter([int(j) for group, n in zip(groups, counts, strict=True) for j in group[n:]])
    for mine, count in zip(taken, counts, strict=True):
        while len(mine) < count:
            mine.append(next(left))
    return taken
