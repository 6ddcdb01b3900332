"""Training of one of the two LoRA factors, shared by the methods that leave the other as it is."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fedsafe_jax.federated.algorithms.base import (
    ClientUpdate,
    FederatedAlgorithm,
    ServerState,
    counted_step,
)
from fedsafe_jax.federated.client import LocalResult, LocalSteps, LocalTraining, local_training


def chosen(tree: Any, others: Any, trained: Mapping[str, jax.Array | bool]) -> Any:
    """Returns one factor of each pair from one pytree, the other from another.

    Args:
      tree: LoRA factors.
      others: the same, or zeros where `tree` has factors.
      trained: whether `tree` is taken, by the key of a factor; it may be traced.
    """

    def one(path, x, other):
        return jnp.where(trained[path[-1].key], x, other)

    return jax.tree_util.tree_map_with_path(one, tree, others)


def train(
    training: LocalTraining,
    start: Any,
    base: Any,
    batches: Any,
    steps: LocalSteps,
    trained: Mapping[str, jax.Array | bool],
) -> LocalResult:
    """Takes local steps in one factor; the other keeps its bits, also under weight decay.

    The gradient of the other is zero before it is clipped, so it takes no part in its length.

    Args:
      training, start, base, batches, steps: see `client.local_training`.
      trained: whether a factor is trained, by its key; it may be traced.
    """
    zero = jax.tree.map(jnp.zeros_like, start)
    return local_training(
        training,
        start,
        base,
        batches=batches,
        steps=steps,
        adjust=lambda gradient, local: chosen(gradient, zero, trained),
        after=lambda local, rate: chosen(local, start, trained),
    )


def make(
    training: LocalTraining,
    learning_rate: float,
    trained: Callable,
    after: Callable = lambda factors: factors,
) -> FederatedAlgorithm:
    """Returns FedAvg whose clients train one factor a round.

    Where the clients share the other factor, the mean of their products is the product of the
    means. The server's step leaves that factor alone, so noise of differential privacy is added to
    the trained one only; server stages between the rounds may change both.

    Args:
      training: loss and optimizer of the clients.
      learning_rate: step size of the server.
      trained: `number of the server's steps so far, int32 -> {"a": bool, "b": bool}`.
      after: `factors -> factors`, a change to the global factors after the server's step.
    """

    def init(factors):
        return ServerState(factors, (), jnp.zeros((), jnp.int32))

    def client_update(server, client_state, start, base, batches, steps):
        which = trained(server.optimizer)
        result = train(training, start, base, batches=batches, steps=steps, trained=which)
        delta = jax.tree.map(jnp.subtract, result.factors, start)
        return ClientUpdate(delta, ()), client_state, result

    def server_update(server, delta, control):
        del control
        zero, which = jax.tree.map(jnp.zeros_like, delta), trained(server.optimizer)
        stepped = counted_step(server, chosen(delta, zero, which), learning_rate)
        return stepped._replace(factors=after(stepped.factors))

    def sent(server):
        return tuple(key for key, on in trained(server.optimizer).items() if on)

    return FederatedAlgorithm(
        init, lambda factors: (), client_update, server_update=server_update, sent=sent
    )
