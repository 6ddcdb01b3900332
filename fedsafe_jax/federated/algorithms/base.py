"""The contract of a federated algorithm: named tuples of pure functions, in the manner of optax."""

import types
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedsafe_jax.federated import lora_average
from fedsafe_jax.federated.client import LocalTraining, local_training


class ServerState(NamedTuple):
    """What the server keeps between rounds."""

    factors: Any  # global LoRA factors
    control: Any  # SCAFFOLD's c, shaped like the factors; () otherwise
    optimizer: Any  # state of the server's optimizer; () without one
    residue: Any = ()  # second LoRA factors, which clients do not train; () without

    @property
    def adapter(self) -> Any:
        """The global model's LoRA factors, those of the residue behind the trained ones."""
        return lora_average.join(self.factors, self.residue)

    def with_adapter(self, adapter: Any) -> "ServerState":
        """Returns the state whose `adapter` is another, of the same shapes."""
        if not jax.tree.leaves(self.residue):
            return self._replace(factors=adapter)
        factors, residue = lora_average.split(adapter, self.factors)
        return self._replace(factors=factors, residue=residue)


class ClientUpdate(NamedTuple):
    """What a client sends back."""

    delta: Any  # local LoRA factors minus those the client started with
    control: Any  # c_i's change; () otherwise


def count(factors: Any, keys: Collection[str] = ("a", "b")) -> int:
    """Returns how many numbers LoRA factors have.

    Args:
      factors: LoRA factors.
      keys: keys of the factors that are counted.
    """
    leaves = jax.tree_util.tree_leaves_with_path(factors)
    return sum(x.size for path, x in leaves if path[-1].key in keys)


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
      combine: `(server_state, LoRA factors of the clients with leaves [clients, ...], weights
        [clients], mean delta, key) -> ServerState`, a step that needs the clients one by one, in
        place of `server_update`; None for none. The updates of a cohort are then held at once.
      sent: `server_state -> keys of the factors that updates change`, such as ("b",): a client
        sends those alone. It is called on the host.
      received: `(factors, clients of a round) -> numbers that each of them receives`.
      queued: whether the loss of its clients is `LocalTraining.loss_fn` itself, so that on
        accelerators their rows are one queue (`models.row_queue`); else clients take turns there.
    """

    init: Callable
    init_client: Callable
    client_update: Callable
    server_update: Callable
    combine: Callable | None = None
    sent: Callable = lambda server: ("a", "b")
    received: Callable = lambda factors, clients: count(factors)
    queued: bool = True


class Hyperparameters(NamedTuple):
    """Hyperparameters of all algorithms, named as in `config.federated`; each reads its own.

    Attributes:
      server_learning_rate: step size of all but the adaptive ones, and of those whose server ends
        at the mean itself (fedex_lora, flora, feddyn).
      adaptive_learning_rate: step size eta of fedadagrad, fedyogi and fedadam.
      beta1: momentum of fedavgm, fedyogi and fedadam.
      beta2: decay of the second moment of fedyogi and fedadam.
      tau: adaptivity of fedadagrad, fedyogi and fedadam: the larger, the closer to plain steps.
      prox_mu: weight of fedprox's proximal term.
      scaffold: what scaffold corrects, a name in `scaffold.CORRECTIONS`.
      second_moment: what is squared, a name in `moments.SECOND_MOMENTS`.
      first_moment: how a momentum starts, a name in `moments.FIRST_MOMENTS`.
      rotation: how far fedrot_lora's clients turn towards the global factors, 0 to 1.
      residue_rank: largest rank of the residue of fedex_lora and flora; 0 for what no product of
        the projections exceeds, which is exact.
      dyn_alpha: weight of feddyn's penalty.
      download_share: share of the numbers that flasc's clients receive.
      reference: what constrained_sft and kl_start hold clients to, a name in
        `referenced.REFERENCES`.
      constrained_betas: beta of an answer's tokens in turn in constrained_sft; the last one is that
        of all further tokens.
      kl_weight: weight of kl_start's divergence from the reference.
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
    rotation: float = 0.5
    residue_rank: int = 0
    dyn_alpha: float = 0.01
    download_share: float = 0.25
    reference: str = "global"
    constrained_betas: tuple[float, ...] = (0.5, 2.0, 2.0, 2.0, 2.0, 0.1)
    kl_weight: float = 1.0


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
      normalize_steps: whether updates count per local step, see `RoundSpec.normalize_steps`.
      sites: whether it runs in a federation of sites, to which the server's factors and controls
        are sent, and nothing else that it keeps.
      personal: `(global factors, what a client keeps) -> LoRA factors` of the client's own model,
        where there is no global one; None where there is.
      refuses: why the algorithm does not go with a field of the config at any value but its
        default, by the field, such as "federated.compression".
    """

    make: Callable
    weighting: str = "examples"
    controls: bool = False
    keeps_mean: bool = False
    normalize_steps: bool = False
    sites: bool = True
    personal: Callable | None = None
    refuses: Mapping[str, str] = types.MappingProxyType({})


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


def counted_step(server: ServerState, delta: Any, rate: float) -> ServerState:
    """Returns the server's state after a plain step, of a server whose `optimizer` is the number of
    its steps.

    Args:
      server: state before the step.
      delta: mean delta of the clients, shaped like the factors.
      rate: step size.
    """
    factors = jax.tree.map(lambda x, d: x + rate * d, server.factors, delta)
    return server._replace(factors=factors, optimizer=server.optimizer + 1)


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

    return FederatedAlgorithm(init, lambda factors: (), client_update, server_update=server_update)
