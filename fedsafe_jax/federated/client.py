"""Local training, written for one client; `round_programs` maps it over many."""

import ast
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from fedsafe_jax.models.microbatch import value_and_grad_in_microbatches
from fedsafe_jax.models.row_queue import value_and_grad_in_queue
from fedsafe_jax.models.sharding import platform_of

LOCAL_STEPS = "local_steps"  # name of the loop over steps in compiled programs


class LocalTraining(NamedTuple):
    """The part of a client's work that all algorithms share.

    Attributes:
      loss_fn: `(factors, base, batch) -> scalar`, a mean over `batch.mask` (see
        `models.microbatch`); with `by_owner`, such as `loss.PackedLoss`, the rows of clients that
        are mapped at once are one queue on accelerators too (`models.row_queue`).
      optimizer: optimizer of the clients, built for a learning rate of 1; its updates are scaled by
        the step's rate.
      accumulation: batches whose gradients are averaged in a step. Each counts the same, however
        many tokens it learns, and one that learns none makes the step smaller.
      mesh: devices that share the work of all clients that are mapped at once (see
        `models.microbatch`); None: each maps its own.
      platform: platform of the devices that compute; None for that of `mesh`.
    """

    loss_fn: Callable
    optimizer: optax.GradientTransformation
    accumulation: int = 1
    mesh: Mesh | None = None
    platform: str | None = None

    @property
    def in_queue(self) -> bool:
        """Whether rows of clients that are mapped at once are moved together into slots."""
        platform = self.platform or platform_of(self.mesh)
        return platform != "cpu" and hasattr(self.loss_fn, "by_owner")

    def value_and_grad(self, slots: tuple[int, ...]) -> Callable:
        """Returns `(factors, base, batch) -> (value, gradient)` of the loss.

        Args:
          slots: see `LocalSteps`; not used where rows are not in one queue.
        """
        if self.in_queue:
            return value_and_grad_in_queue(self.loss_fn, slots, self.mesh)
        return value_and_grad_in_microbatches(self.loss_fn, self.mesh, self.platform)


@struct.dataclass
class LocalSteps:
    """What is the same in the local steps of all clients of a round.

    Attributes:
      rates: float32 `[steps]`, learning rates.
      slots: numbers of slots that hold the filled rows of a gradient, all clients' that are mapped
        at once; static, see `models.row_queue`. () for all rows, filled or not.
    """

    rates: jax.Array
    slots: tuple[int, ...] = struct.field(pytree_node=False, default=())


class LocalResult(NamedTuple):
    """The end of a client's round."""

    factors: Any  # LoRA factors after the last step
    gradient: Any  # mean raw gradient of the steps, shaped like the factors
    losses: jax.Array  # float32 [steps], 0 in steps without targets
    active: jax.Array  # float32 [steps], 1 where the step had targets


class OptimizerError(ValueError):
    """The optimizer cannot be built."""


def adamw_hf(
    learning_rate: float,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Returns AdamW as in transformers 4: eps is added before the bias is corrected.

    The first steps are shorter than those of `optax.adamw` where gradients are small.

    Args:
      learning_rate: step size.
      b1, b2: decay of the first and of the second moment.
      eps: added to the root of the second moment.
      weight_decay: weight decay, scaled by the learning rate.
    """

    def init(params):
        return optax.scale_by_adam().init(params)

    def update(gradient, state, params=None):
        del params
        count = state.count + 1
        mu = optax.tree.update_moment(gradient, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(gradient, state.nu, b2, 2)
        correction = jnp.sqrt(1 - b2**count) / (1 - b1**count)
        step = jax.tree.map(lambda m, v: correction * m / (jnp.sqrt(v) + eps), mu, nu)
        return step, optax.ScaleByAdamState(count, mu, nu)

    return optax.chain(
        optax.GradientTransformation(init, update),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


# Optimizers beside optax's aliases, by name.
OPTIMIZERS: dict[str, Callable] = {"adamw_hf": adamw_hf}


def make_optimizer(spec: str = "adam", clip: float = 1.0) -> optax.GradientTransformation:
    """Returns a client's optimizer for a learning rate of 1, after clipping the global norm.

    Args:
      spec: an optax alias with arguments other than the rate, such as "adam",
        "adamw(weight_decay=0.01)", "sgd(momentum=0.9)"; or a name in `OPTIMIZERS`.
      clip: largest global norm of a gradient; 0 for no limit.

    Raises:
      OptimizerError: optax has no such alias, or the alias does not take these arguments.
    """
    try:
        call = ast.parse(spec, mode="eval").body
        if isinstance(call, ast.Name):
            name, arguments = call.id, {}
        else:
            assert isinstance(call, ast.Call) and not call.args
            name = call.func.id
            arguments = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
    except (AssertionError, AttributeError, SyntaxError, ValueError):
        raise OptimizerError(
            f"'{spec}' cannot be read; expected such as adam or adamw(weight_decay=0.01)."
        ) from None
    alias = OPTIMIZERS.get(name) or getattr(optax, name, None)
    takes = inspect.signature(alias).parameters if inspect.isfunction(alias) else {}
    if "learning_rate" not in takes:
        raise OptimizerError(
            f"'{name}' is no optimizer of optax; expected such as adam, adamw, sgd, lion."
        )
    if unknown := sorted(arguments.keys() - takes.keys() | arguments.keys() & {"learning_rate"}):
        raise OptimizerError(f"'{name}' does not take {unknown[0]}; the rate is learning_rate's.")
    optimizer = alias(learning_rate=1.0, **arguments)
    return optax.chain(optax.clip_by_global_norm(clip), optimizer) if clip else optimizer


def local_training(
    training: LocalTraining,
    start: Any,
    base: Any,
    batches: Any,
    steps: LocalSteps,
    adjust: Callable = lambda gradient, local: gradient,
    after: Callable = lambda local, rate: local,
) -> LocalResult:
    """Takes local steps from `start`, with a fresh optimizer.

    A step without targets (the data has run out, or a straggler's time is up) moves nothing.

    Args:
      training: loss, optimizer, accumulation.
      start: LoRA factors that the client begins with.
      base: frozen base parameters.
      batches: pytree with leaves `[steps * accumulation, rows, seq]` and a field `mask`.
      steps: learning rates of the steps, and slots of their rows.
      adjust: `(gradient, local) -> gradient`, an algorithm's change to every gradient; `local` is
        the client's current factors.
      after: `(local, rate) -> local`, an algorithm's change to the factors after every step.
    """
    rates, accumulation = steps.rates, training.accumulation
    batches = jax.tree.map(lambda x: x.reshape(len(rates), accumulation, *x.shape[1:]), batches)
    value_and_grad = training.value_and_grad(steps.slots)

    def gradients(local, micro):
        if accumulation == 1:
            return value_and_grad(local, base, jax.tree.map(lambda x: x[0], micro))

        def add(carry, batch):
            return jax.tree.map(jnp.add, carry, value_and_grad(local, base, batch)), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, local))
        total, _ = jax.lax.scan(add, zero, micro)
        return jax.tree.map(lambda x: x / accumulation, total)

    def step(carry, inputs):
        local, state, gradient_sum = carry
        micro, rate = inputs
        loss, gradient = gradients(local, micro)
        active = (micro.mask.sum() > 0).astype(jnp.float32)
        # The raw gradient, before `adjust`: SCAFFOLD's new control variate is its mean.
        gradient_sum = jax.tree.map(jnp.add, gradient_sum, gradient)
        updates, state = training.optimizer.update(adjust(gradient, local), state, local)
        moved = after(jax.tree.map(lambda p, u: p + rate * u, local, updates), rate)
        local = jax.tree.map(lambda new, old: jnp.where(active > 0, new, old), moved, local)
        return (local, state, gradient_sum), (loss, active)

    zero = jax.tree.map(jnp.zeros_like, start)
    carry = (start, training.optimizer.init(start), zero)
    # Named, so that a compiled program tells what lies inside the steps (see `aot.hlo`).
    with jax.named_scope(LOCAL_STEPS):
        (local, _, gradient_sum), (losses, active) = jax.lax.scan(step, carry, (batches, rates))
    done = jnp.maximum(active.sum(), 1.0)
    return LocalResult(local, jax.tree.map(lambda g: g / done, gradient_sum), losses, active)
