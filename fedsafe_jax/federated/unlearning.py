"""Unlearning of a client without training: its updates are taken out of the means of their rounds.

Subtracting them from the global model is the first step of Wu, Zhu and Mitra, 2022
(arXiv 2201.09441). It is approximate: what the other clients would have sent in later rounds, had
the model been another, is not known. The exact way is a replay, `federated.exclude`.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np


def subtract(
    factors: Any,
    rounds: Iterable[Mapping[int, Any]],
    client: int,
    weights: Mapping[int, float] | None = None,
) -> Any:
    """Returns LoRA factors from which a client's part in the rounds is taken out.

    A round moves the server by `m = sum_i w_i u_i / W`, with `W = sum_i w_i`. Without client k it
    would have been the mean of the others, so each of its rounds adds `(m - u_k) w_k / (W - w_k)`;
    a round that was its alone moved by `u_k`, which is taken away.

    Args:
      factors: LoRA factors of the server after the rounds.
      rounds: updates of all clients that counted, by id, of each round; rounds without the client
        change nothing. Server steps must be means: FedAvg, FedProx and their like.
      client: id of the client.
      weights: weight of each client in the means; None for equal ones.

    >>> updates = {0: {"a": np.float32(1.0)}, 1: {"a": np.float32(4.0)}}
    >>> subtract({"a": np.float32(2.5)}, [updates], client=1)  # the mean moved from 0 to 2.5
    {'a': np.float32(1.0)}
    """
    for updates in rounds:
        if client not in updates:
            continue
        share = {i: 1.0 if weights is None else weights[i] for i in updates}
        others = [i for i in updates if i != client]
        rest, own = sum(share[i] for i in others), share[client]
        # Of what the client sent, and of what each of the others did: the mean of the others less
        # the mean of all.
        change = {i: share[i] / rest - share[i] / (rest + own) for i in others} if rest else {}
        change[client] = -own / (rest + own)
        for i, factor in change.items():
            factors = jax.tree.map(
                lambda x, u, factor=factor: x + np.float32(factor) * u, factors, updates[i]
            )
    return factors


def distance(one: Any, exact: Any, learned: Any) -> float:
    """Returns how far unlearned factors are from the exact ones, over how far learned ones are.

    0 is exact, and 1 as far from it as if nothing had been unlearned.

    Args:
      one: unlearned factors.
      exact: factors of the replay.
      learned: factors of the run with the client.
    """
    return _length(one, exact) / _length(learned, exact)


def _length(one: Any, other: Any) -> float:
    squares = jax.tree.map(lambda a, b: float(np.sum((a - b) ** 2, dtype=np.float64)), one, other)
    return math.sqrt(sum(jax.tree.leaves(squares)))
