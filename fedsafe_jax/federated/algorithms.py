"""Federated algorithms as named tuples of pure functions, in the manner of optax."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedsafe_jax.federated import server_optimizers
from fedsafe_jax.federated.client import LocalTraining, local_training


class ServerState(NamedTuple):
    """What the server keeps between rounds."""

    factors: Any  # global LoRA factors
    control: Any  # SCAFFOLD's c, shaped like the adapter; () otherwise
    optimizer: Any  # state of the server's optimizer; () without one


class ClientUpdate(NamedTuple):
    """What a client sends back."""

    delta: Any  # local LoRA factors minus those it started with
    control: Any  # c_i's change; () otherwise


class FederatedAlgorithm(NamedTuple):
    """`init`, `init_client`, `client_update` and `server_update`, all pure.

    Attributes:
      init: `adapter -> ServerState`.
      init_client: `adapter -> state` that a client keeps between rounds; () for none.
      client_update: `(server_state, client_state, start, base, batches, rates [steps]) ->
        (ClientUpdate, client_state, Trained)`, for one client; `start` is the global adapter, cut
        to the client's rank.
      server_update: `(server_state, mean delta, sum of control changes) -> ServerState`; both
        shaped like the adapter, the latter () without controls.
    """

    init: Callable
    init_client: Callable
    client_update: Callable
    server_update: Callable


class Settings(NamedTuple):
    """Hyperparameters of the algorithms; each reads its own.

    Attributes:
      server_rate: of fedavg, fedprox, scaffold, fedavgm.
      adaptive_rate, beta1, beta2, tau: eta of fedadagrad, fedyogi, fedadam, and their moments;
        beta1 is also fedavgm's momentum.
      prox_mu: of fedprox.
      scaffold: `gradient`: corrects every gradient (the paper); `post_step`: the parameters after
        every optimizer step (OpenFedLLM).
      second_moment, first: see `server_optimizers.adaptive`.
    """

    server_rate: float = 1.0
    adaptive_rate: float = 1e-2
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3
    prox_mu: float = 0.01
    scaffold: str = "gradient"
    second_moment: str = "d2"
    first: str = "zero"


def _apply(optimizer, server: ServerState, delta) -> ServerState:
    pseudo_gradient = jax.tree.map(jnp.negative, delta)
    updates, state = optimizer.update(pseudo_gradient, server.optimizer, server.factors)
    return server._replace(factors=jax.tree.map(jnp.add, server.factors, updates), optimizer=state)


def fedopt(
    training: LocalTraining, optimizer: optax.GradientTransformation, prox_mu: float = 0.0
) -> FederatedAlgorithm:
    """Local training, and a server optimizer on the mean (Reddi et al., 2021, Algorithm 1).

    With `optax.sgd(1.0)` this is FedAvg (McMahan et al., 2017): x += sum_k w_k (y_k - x).

    Args:
      training: the clients' work.
      optimizer: of the server, takes the negative mean delta as a gradient.
      prox_mu: adds `mu/2 |y - x|^2` to the clients' losses (FedProx, Li et al., 2020, Eq. 2).
    """

    def init(adapter):
        return ServerState(adapter, (), optimizer.init(adapter))

    def client_update(server, client_state, start, base, batches, rates):
        del server

        def pull(gradient, local):
            return jax.tree.map(lambda g, y, x: g + prox_mu * (y - x), gradient, local, start)

        adjust = {"adjust": pull} if prox_mu else {}
        trained = local_training(training, start, base, batches=batches, rates=rates, **adjust)
        delta = jax.tree.map(jnp.subtract, trained.factors, start)
        return ClientUpdate(delta, ()), client_state, trained

    def server_update(server, delta, control):
        del control
        return _apply(optimizer, server, delta)

    return FederatedAlgorithm(init, lambda adapter: (), client_update, server_update)


def scaffold(
    training: LocalTraining,
    optimizer: optax.GradientTransformation,
    num_clients: int,
    variant: str = "gradient",
) -> FederatedAlgorithm:
    """SCAFFOLD (Karimireddy et al., 2020): local steps are corrected by `c - c_i`.

    `gradient` adds the correction to every gradient, and the new `c_i` is the mean raw gradient of
    the local steps. Under SGD that equals the paper's option II, `c_i - c + (x - y)/(K rate)`;
    unlike that formula it stays a gradient under Adam, whose steps are not proportional to
    gradients. `post_step` subtracts `rate * (c - c_i)` from the parameters after every optimizer
    step and keeps the formula, as OpenFedLLM does. Both: `c += (1/N) sum_i (c_i_new - c_i)`.
    """

    def init(adapter):
        return ServerState(adapter, _zeros(adapter), optimizer.init(adapter))

    def client_update(server, client_state, start, base, batches, rates):
        correction = jax.tree.map(jnp.subtract, server.control, client_state)
        if variant == "gradient":
            hook = {"adjust": lambda gradient, local: jax.tree.map(jnp.add, gradient, correction)}
        else:
            hook = {"after": lambda y, rate: jax.tree.map(lambda p, c: p - rate * c, y, correction)}
        trained = local_training(training, start, base, batches=batches, rates=rates, **hook)
        delta = jax.tree.map(jnp.subtract, trained.factors, start)
        if variant == "gradient":
            new = trained.gradient
        else:
            way = jnp.maximum(jnp.sum(rates * trained.active), 1e-12)
            new = jax.tree.map(lambda d, c: -d / way - c, delta, correction)
        change = jax.tree.map(jnp.subtract, new, client_state)
        return ClientUpdate(delta, change), new, trained

    def server_update(server, delta, control):
        changed = jax.tree.map(lambda c, d: c + d / num_clients, server.control, control)
        return _apply(optimizer, server, delta)._replace(control=changed)

    return FederatedAlgorithm(init, _zeros, client_update, server_update)


def _zeros(adapter):
    return jax.tree.map(jnp.zeros_like, adapter)


ALGORITHMS = ("fedavg", "fedprox", "scaffold", "fedavgm", "fedadagrad", "fedyogi", "fedadam")


def make(
    name: str, training: LocalTraining, num_clients: int, settings: Settings | None = None
) -> FederatedAlgorithm:
    """The algorithm of a name in `ALGORITHMS`."""
    s = settings or Settings()
    plain = optax.sgd(s.server_rate)
    if name == "scaffold":
        return scaffold(training, plain, num_clients, s.scaffold)
    if name in ("fedavg", "fedprox"):
        return fedopt(training, plain, s.prox_mu if name == "fedprox" else 0.0)
    if name == "fedavgm":
        return fedopt(training, server_optimizers.momentum(s.server_rate, s.beta1, s.first))
    kind = name.removeprefix("fed")
    moments = (s.beta1, s.beta2, s.tau, s.second_moment, s.first)
    return fedopt(training, server_optimizers.adaptive(kind, s.adaptive_rate, *moments))
