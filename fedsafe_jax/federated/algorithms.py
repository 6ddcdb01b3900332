"""Federated algorithms as named tuples of pure functions, in the manner of optax."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedsafe_jax.federated.aggregation import weighted_mean
from fedsafe_jax.federated.client import local_training


class ServerState(NamedTuple):
    """What the server keeps between rounds."""

    adapter: Any  # global LoRA factors
    control: Any  # SCAFFOLD's c, shaped like the adapter; () otherwise
    client_states: Any  # leaves [num_clients, ...]; SCAFFOLD's c_i; () otherwise


class ClientUpdate(NamedTuple):
    """What a client sends back."""

    adapter: Any  # local minus global adapter
    control: Any  # c_i's change; () otherwise


class FederatedAlgorithm(NamedTuple):
    """`init`, `client_update` and `server_update`, all pure.

    Attributes:
      init: `(adapter, num_clients) -> ServerState`.
      client_update: `(server_state, client_state, base, batches, rate) ->
        (ClientUpdate, client_state, losses [steps])`, for one client.
      server_update: `(server_state, updates with leaves [clients, ...], weights [clients]) ->
        ServerState`; `client_states` are written by the round.
    """

    init: Callable
    client_update: Callable
    server_update: Callable


def local_optimizer() -> optax.GradientTransformation:
    """AdamW's direction without decay, after clipping the gradient's norm to 1."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())


def fedavg(loss_fn: Callable, optimizer: optax.GradientTransformation) -> FederatedAlgorithm:
    """Federated averaging (McMahan et al., 2017): x += sum_k w_k (y_k - x)."""

    def init(adapter, num_clients):
        del num_clients
        return ServerState(adapter, (), ())

    def client_update(server, client_state, base, batches, rate):
        zero = jax.tree.map(jnp.zeros_like, server.adapter)
        local, _, losses = local_training(
            loss_fn, optimizer, server.adapter, base, batches, zero, rate
        )
        delta = jax.tree.map(jnp.subtract, local, server.adapter)
        return ClientUpdate(delta, ()), client_state, losses

    def server_update(server, updates, weights):
        step = weighted_mean(updates.adapter, weights)
        return server._replace(adapter=jax.tree.map(jnp.add, server.adapter, step))

    return FederatedAlgorithm(init, client_update, server_update)


def scaffold(loss_fn: Callable, optimizer: optax.GradientTransformation) -> FederatedAlgorithm:
    """SCAFFOLD (Karimireddy et al., 2020): every local gradient is corrected by `c - c_i`.

    The new `c_i` is the mean raw gradient of the local steps. Under SGD that equals the paper's
    option II, `c_i - c + (x - y)/(K rate)`; unlike that formula it stays a gradient under Adam,
    whose steps are not proportional to gradients. Then `c += (1/N) sum_i (c_i_new - c_i)`.
    """

    def init(adapter, num_clients):
        zero = jax.tree.map(jnp.zeros_like, adapter)
        states = jax.tree.map(lambda z: jnp.zeros((num_clients, *z.shape), z.dtype), zero)
        return ServerState(adapter, zero, states)

    def client_update(server, client_state, base, batches, rate):
        correction = jax.tree.map(jnp.subtract, server.control, client_state)
        local, gradient, losses = local_training(
            loss_fn, optimizer, server.adapter, base, batches, correction, rate
        )
        delta = jax.tree.map(jnp.subtract, local, server.adapter)
        change = jax.tree.map(jnp.subtract, gradient, client_state)
        return ClientUpdate(delta, change), gradient, losses

    def server_update(server, updates, weights):
        num_clients = jax.tree.leaves(server.client_states)[0].shape[0]
        present = (weights > 0).astype(jnp.float32)
        change = jax.tree.map(
            lambda d: jnp.tensordot(present, d, axes=1) / num_clients, updates.control
        )
        step = weighted_mean(updates.adapter, weights)
        return server._replace(
            adapter=jax.tree.map(jnp.add, server.adapter, step),
            control=jax.tree.map(jnp.add, server.control, change),
        )

    return FederatedAlgorithm(init, client_update, server_update)


ALGORITHMS = {"fedavg": fedavg, "scaffold": scaffold}
