"""Partitions: how examples are split over the clients."""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from fedsafe_jax.data.examples import Example


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


# `(safe examples, shuffled indices, num_clients, alpha, rng) -> indices by client` by name.
PARTITIONS: dict[str, Callable] = {
    "iid": _iid,
    "dirichlet": _dirichlet,
    "user": functools.partial(_by_field, field="user"),
    "language": functools.partial(_by_field, field="language"),
    "category": functools.partial(_by_field, field="category"),
    "source": functools.partial(_by_field, field="source"),
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
    """Deals examples to clients.

    Args:
      safe, unsafe: safe and unsafe examples, the two pools.
      sizes: examples that each client holds, at most: a pool, or a client's part of it, may hold
        fewer.
      harmful_shares: share of unsafe examples at each client, in [0, 1].
      kind: a name in `PARTITIONS`: `iid`; `dirichlet` (safe examples skewed by source and
        category); `user`, `language`, `category` or `source` (the safe examples of one value of
        that field stay together).
      rng: numpy generator.
      alpha: concentration for `dirichlet`.

    Returns:
      The examples of each client, in a random order.

    Raises:
      PartitionError: an unknown kind, too few examples, or an empty client.
    """
    if kind not in PARTITIONS:
        raise PartitionError(f"partition='{kind}': expected {', '.join(PARTITIONS)}.")
    num_clients = len(sizes)
    num_unsafe = [round(h * n) for h, n in zip(harmful_shares, sizes, strict=True)]
    num_safe = [n - u for n, u in zip(sizes, num_unsafe, strict=True)]
    for name, pool, need in (("safe", safe, num_safe), ("unsafe", unsafe, num_unsafe)):
        if len(pool) < sum(n > 0 for n in need):
            raise PartitionError(
                f"num_clients={num_clients}, but there are only {len(pool)} {name} examples: more "
                "clients than examples. Lower num_clients or add data."
            )
    order = rng.permutation(len(safe))
    groups = PARTITIONS[kind](safe, order, num_clients, alpha, rng)
    harmful = rng.permutation(len(unsafe))
    holders = [i for i, n in enumerate(num_unsafe) if n]
    dealt = {i: harmful[k :: len(holders)][: num_unsafe[i]] for k, i in enumerate(holders)}
    clients = []
    for i, group in enumerate(groups):
        mine = [safe[j] for j in group[: num_safe[i]]]
        mine += [unsafe[j] for j in dealt.get(i, ())]
        if not mine:
            raise PartitionError(f"client {i} has no example; raise dirichlet_alpha or add data.")
        clients.append([mine[j] for j in rng.permutation(len(mine))])
    return clients
