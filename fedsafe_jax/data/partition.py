"""Splits examples over clients, and draws each client's local batches."""

from collections.abc import Sequence

import numpy as np

from fedsafe_jax.data.chat import Encoded
from fedsafe_jax.data.packing import Batch, assign_rows, bucket, fill
from fedsafe_jax.data.sources import Example


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


def partition(
    safe: Sequence[Example],
    unsafe: Sequence[Example],
    num_clients: int,
    examples_per_client: int,
    harmful_share: float,
    kind: str,
    rng: np.random.Generator,
    alpha: float = 0.5,
) -> list[list[Example]]:
    """Deals examples to clients.

    Args:
      safe, unsafe: the two pools.
      num_clients: how many clients.
      examples_per_client: how many each holds.
      harmful_share: share of unsafe examples at each client, in [0, 1].
      kind: `iid`; `dirichlet` (safe examples skewed by source and category); `user`, `category` or
        `source` (the safe examples of one value of that field stay together).
      rng: numpy generator.
      alpha: concentration for `dirichlet`.

    Raises:
      PartitionError: too few examples, or an empty client.
    """
    num_unsafe = round(harmful_share * examples_per_client)
    num_safe = examples_per_client - num_unsafe
    for name, pool, need in (("safe", safe, num_safe), ("unsafe", unsafe, num_unsafe)):
        if len(pool) < num_clients and need:
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
    elif kind in ("user", "category", "source"):
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
        raise PartitionError(
            f"partition='{kind}': expected iid, dirichlet, user, category or source."
        )
    harmful = rng.permutation(len(unsafe))
    clients = []
    for i, group in enumerate(groups):
        mine = [safe[j] for j in group[:num_safe]]
        mine += [unsafe[j] for j in harmful[i::num_clients][:num_unsafe]]
        if not mine:
            raise PartitionError(f"client {i} has no example; raise dirichlet_alpha or add data.")
        clients.append([mine[j] for j in rng.permutation(len(mine))])
    return clients


def sample_cohort(seed: int, round_number: int, num_clients: int, clients_per_round: int):
    """Sorted ids of a round's clients, int32, drawn without replacement from (seed, round)."""
    rng = np.random.default_rng([seed, round_number, 0])
    return np.sort(rng.choice(num_clients, clients_per_round, replace=False)).astype(np.int32)


def local_batches(
    clients: Sequence[Sequence[Encoded]], seed: int, round_number: int, client_ids, steps: int,
    batch_size: int, seq: int,
) -> Batch:  # fmt: skip
    """Packed batches of a round, `[clients, steps, rows, seq]`.

    Each client walks through shuffles of its own examples, `batch_size` a step, starting a new
    shuffle when one ends. Rows are the bucketed maximum over the round. A client without examples
    gets empty rows, whose loss mask is zero.
    """
    plans, most = [], 1
    for client in client_ids:
        examples = clients[client]
        rng = np.random.default_rng([seed, round_number, 1, int(client)])
        draws: list[int] = []
        while examples and len(draws) < steps * batch_size:
            draws.extend(rng.permutation(len(examples)))
        plan = []
        for step in range(steps):
            chosen = [examples[i] for i in draws[step * batch_size : (step + 1) * batch_size]]
            rows = assign_rows([len(e.ids) for e in chosen], seq)
            most = max(most, len(rows))
            plan.append((chosen, rows))
        plans.append(plan)
    count = bucket(most)
    filled = [[fill(chosen, rows, count, seq) for chosen, rows in plan] for plan in plans]
    return Batch(
        *(
            np.stack([np.stack([getattr(b, name) for b in plan]) for plan in filled])
            for name in Batch._fields
        )
    )
