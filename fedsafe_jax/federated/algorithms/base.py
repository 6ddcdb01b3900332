"""The contract of a federated algorithm: named tuples of pure functions, in the manner of optax."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedsafe_jax.federated.client import LocalTraining, local_training


class ServerState(NamedTuple):
    """What the server keeps between rounds."""

    factors: Any  # global LoRA factors
    control: Any  # SCAFFOLD's c, shaped like the factors; () otherwise
    optimizer: Any  # state of the server's optimizer; () without one


class ClientUpdate(NamedTuple):
    """What a client sends back."""

    delta: Any  # local LoRA factors minus those the client started with
    control: Any  # c_i's change; () otherwise


class FederatedAlgorithm(NamedTuple):
    """`init`, `init_client`, `client_update` and `server_update`, all pure.

    Attributes:
      init: `factors -> ServerState`.
      init_client: `factors -> state` that a client keeps between rounds; () for none.
      client_update: `(server_state, client_state, start, base, batches, LocalSteps) ->
        (ClientUpdate, client_state, LocalResult)`, for one client; `start` is the global factors,
        cut to the client's rank.
      server_update: `(server_state, mean delta, sum of control changes) -> ServerState`; both
        shaped like the factors, the latter () without controls.
    """

    init: Callable
    init_client: Callable
    client_update: Callable
    server_update: Callable


class Hyperparameters(NamedTuple):
    """Hyperparameters of all algorithms, named as in `config.federated`; each reads its own.

    Attributes:
      server_learning_rate: step size of fedavg, fedprox, scaffold and fedavgm.
      adaptive_learning_rate: step size eta of fedadagrad, fedyogi and fedadam.
      beta1: momentum of fedavgm, fedyogi and fedadam.
      beta2: decay of the second moment of fedyogi and fedadam.
      tau: adaptivity of fedadagrad, fedyogi and fedadam: the larger, the closer to plain steps.
      prox_mu: weight of fedprox's proximal term.
      scaffold: what scaffold corrects, a name in `scaffold.CORRECTIONS`.
      second_moment: what is squared, a name in `moments.SECOND_MOMENTS`.
      first_moment: how a momentum starts, a name in `moments.FIRST_MOMENTS`.
    """

    server_learning_rate: float = 1.0
    adaptive_learning_rate: float = 1e-2
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3
    prox_mu: float = 0.01
    scaffold: str = "gradient"
    second_moment: str = "d2"
    first_moment: str = "zero"


class Algorithm(NamedTuple):
    """An entry of `ALGORITHMS`: how an algorithm is built, and what a run must know about it.

    Attributes:
      make: `(LocalTraining, num_clients, Hyperparameters) -> FederatedAlgorithm`.
      weighting: weights of the clients in the mean where the config says `auto`, a name in
        `participation.WEIGHTINGS`.
      controls: whether clients send control variates. They are summed over the cohort, so they
        go neither with robust aggregation, nor with ranks that differ, nor with noise.
      keeps_mean: whether the server's step, at a rate of 1, ends at the mean of the clients'
        factors, and nothing in their basis lives on into the next round. Without, the algorithm
        does not go with averages of products, which change the basis.
    """

    make: Callable
    weighting: str = "examples"
    controls: bool = False
    keeps_mean: bool = False


def server_step(
    optimizer: optax.GradientTransformation, server: ServerState, delta: Any
) -> ServerState:
    """Returns the server's state after one optimizer step on the mean delta.

    Args:
      optimizer: server optimizer; it takes the negative delta as a gradient.
      server: state before the step.
      delta: mean delta of the clients, shaped like the factors.
    """
    pseudo_gradient = jax.tree.map(jnp.negative, delta)
    updates, state = optimizer.update(pseudo_gradient, server.optimizer, server.factors)
    return server._replace(factors=jax.tree.map(jnp.add, server.factors, updates), optimizer=state)


def fedopt(
    training: LocalTraining, optimizer: optax.GradientTransformation, prox_mu: float = 0.0
) -> FederatedAlgorithm:
    """Returns local training with a server optimizer on the mean delta.

    This is FedOpt, Algorithm 1 of "Adaptive Federated Optimization" (Reddi et al., 2021, arXiv
    2003.00295). With `optax.sgd(1.0)` it is FedAvg: x += sum_k w_k (y_k - x).

    Args:
      training: loss and optimizer of the clients.
      optimizer: server optimizer; it takes the negative mean delta as a gradient.
      prox_mu: weight of `mu/2 |y - x|^2` in the clients' losses (FedProx); 0 for none.
    """

    def init(factors):
        return ServerState(factors, (), optimizer.init(factors))

    def client_update(server, client_state, start, base, batches, steps):
        del server

        def pull(gradient, local):
            return jax.tree.map(lambda g, y, x: g + prox_mu * (y - x), gradient, local, start)

        adjust = {"adjust": pull} if prox_mu else {}
        result = local_training(training, start, base, batches=batches, steps=steps, **adjust)
        delta = jax.tree.map(jnp.subtract, result.factors, start)
        return ClientUpdate(delta, ()), client_state, result

    def server_update(server, delta, control):
        del control
        return server_step(optimizer, server, delta)

    return FederatedAlgorithm(init, lambda factors: (), client_update, server_update)
