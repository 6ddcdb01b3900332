"""Splits examples over clients."""

from collections.abc import Sequence

import numpy as np

from fedsafe_jax.data.examples import Example

FIELDS = ("user", "language", "category", "source")


class PartitionError(ValueError):
    """The examples cannot be split as asked."""


def _field(example: Example, field: str) -> str:
    return getattr(example, field)


def dirichlet_groups(labels, num_clients: int, alpha: float, rng) -> list[list[int]]:
    """Label-skewed split (Hsu et al., 2019): a label's examples follow Dirichlet(alpha) shares."""
    groups: list[list[int]] = [[] for _ in range(num_clients)]
    for label in sorted(set(labels)):
        indices = rng.permutation([i for i, found in enumerate(labels) if found == label])
        shares = rng.dirichlet(np.full(num_clients, alpha))
        cuts = (np.cumsum(shares)[:-1] * len(indices)).astype(int)
        for group, part in zip(groups, np.split(indices, cuts), strict=True):
            group.extend(int(i) for i in part)
    return groups


def client_sizes(num_clients: int, mean: int, sigma: float, rng: np.random.Generator) -> list[int]:
    """Examples that each client holds: log-normal with this mean, all the same for sigma 0."""
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
      safe, unsafe: the two pools.
      sizes: examples that each client holds, at most: a pool, or a client's part of it, may hold
        fewer.
      harmful_shares: share of unsafe examples at each client, in [0, 1].
      kind: `iid`; `dirichlet` (safe examples skewed by source and category); `user`, `language`,
        `category` or `source` (the safe examples of one value of that field stay together).
      rng: numpy generator.
      alpha: concentration for `dirichlet`.

    Raises:
      PartitionError: too few examples, or an empty client.
    """
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
    if kind == "iid":
        groups = [[int(j) for j in order[i::num_clients]] for i in range(num_clients)]
    elif kind == "dirichlet":
        labels = [f"{e.source}/{e.category}" for e in safe]
        groups = dirichlet_groups(labels, num_clients, alpha, rng)
    elif kind in FIELDS:
        values = sorted({_field(e, kind) for e in safe})
        if len(values) < num_clients:
            raise PartitionError(
                f"partition='{kind}': {len(values)} values for {num_clients} clients; a client "
                "would be empty."
            )
        owner = {value: i % num_clients for i, value in enumerate(rng.permutation(values))}
        groups = [[] for _ in range(num_clients)]
        for j in order:
            groups[owner[_field(safe[j], kind)]].append(int(j))
    else:
        raise PartitionError(f"partition='{kind}': expected iid, dirichlet, {', '.join(FIELDS)}.")
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
