"""Shares of unsafe examples: how many a client holds, and what pools that are too small allow."""

import math
from collections.abc import Sequence

import numpy as np


def unsafe_counts(
    sizes: Sequence[int], harmful_shares: Sequence[float], num_safe: int, num_unsafe: int
) -> list[int] | None:
    """Splits every client's size into safe and unsafe examples; returns the unsafe ones.

    A share of a few examples is rarely a whole number. Largest remainders decide who gets one
    more, so that a client is less than one example off its share. All clients together are at most
    half an example off theirs; at most one where the pools allow no less.

    Args:
      sizes: examples of each client.
      harmful_shares: share of unsafe examples at each client, in [0, 1].
      num_safe, num_unsafe: sizes of the two pools.

    Returns:
      Unsafe examples by client; None where the pools are too small.
    """
    exact = [_product(n, h) for n, h in zip(sizes, harmful_shares, strict=True)]
    wanted = round(sum(exact), 6)
    nearest = math.floor(wanted + 0.5)
    for total in (nearest, nearest + 1, nearest - 1):
        possible = sum(map(math.floor, exact)) <= total <= sum(map(math.ceil, exact))
        if possible and abs(total - wanted) <= 1:
            if total <= num_unsafe and sum(sizes) - total <= num_safe:
                floors = [math.floor(x) for x in exact]
                return _round_up(floors, np.subtract(exact, floors), total)
    return None


def _product(size: int, share: float) -> float:
    """Multiplies without the error of products such as 0.29 * 100, which is 28.999999999999996."""
    return round(size * share, 6)


def _round_up(counts: list[int], remainders: Sequence[float], total: int) -> list[int]:
    """Adds one to the counts of the largest remainders, so that they sum to `total`."""
    largest = sorted(range(len(counts)), key=lambda i: (-remainders[i], i))[: total - sum(counts)]
    return [n + (i in largest) for i, n in enumerate(counts)]


def fit_sizes(
    sizes: Sequence[int],
    harmful_shares: Sequence[float],
    num_safe: int,
    num_unsafe: int,
    safe_by_client: Sequence[int] | None = None,
) -> list[int]:
    """Shrinks sizes to what the pools hold, so that every client keeps its share of unsafe ones.

    Args:
      sizes: examples asked for at each client.
      harmful_shares: share of unsafe examples at each client, in [0, 1].
      num_safe, num_unsafe: sizes of the two pools.
      safe_by_client: safe examples that each client may have; None where any may have any.

    Returns:
      The sizes themselves where the pools suffice; else sizes in proportion to them, of clients
      that may have fewer safe examples in proportion to these. A size may be 0.
    """
    if safe_by_client is not None:
        sizes = [
            n if h == 1 else min(n, _most(have, h))
            for n, h, have in zip(sizes, harmful_shares, safe_by_client, strict=True)
        ]

    whole, total = sum(sizes), sum(sizes)
    if unsafe_counts(sizes, harmful_shares, num_safe, num_unsafe) is None:
        unsafe = sum(n * h for n, h in zip(sizes, harmful_shares, strict=True))
        bounds = [num_unsafe / unsafe] if unsafe else []
        bounds += [num_safe / (whole - unsafe)] if whole > unsafe else []
        # From above, as rounding may allow a little more.
        total = min(math.ceil(whole * min(bounds)) + len(sizes), whole)
    while True:
        parts = [divmod(n * total, max(whole, 1)) for n in sizes]
        shrunk = _round_up([n for n, _ in parts], [rest for _, rest in parts], total)
        if not total or unsafe_counts(shrunk, harmful_shares, num_safe, num_unsafe) is not None:
            return shrunk
        total -= 1


def _most(num_safe: int, harmful_share: float) -> int:
    """Computes the largest size of a client by its safe examples, however it is rounded."""
    size = math.floor(_product(num_safe, 1 / (1 - harmful_share)))
    while size - math.floor(_product(size, harmful_share)) > num_safe:
        size -= 1
    return size


def possible_sizes(
    num_safe: int, num_unsafe: int, harmful_share: float, num_clients: int, examples: int
) -> str:
    """Says what to ask for instead, where the pools are too small.

    Args:
      num_safe, num_unsafe: sizes of the two pools.
      harmful_share: share of unsafe examples over all clients, in [0, 1].
      num_clients, examples: clients, and examples of each, that were asked for.

    Returns:
      Such as "examples_per_client=3 or num_clients=1"; "more data" where neither can be had.
    """
    least = [num_unsafe / harmful_share] if harmful_share else []
    least += [num_safe / (1 - harmful_share)] if harmful_share < 1 else []
    total = math.floor(round(min(least), 6))
    possible = (("examples_per_client", total // num_clients), ("num_clients", total // examples))
    return " or ".join(f"{name}={most}" for name, most in possible if most) or "more data"
