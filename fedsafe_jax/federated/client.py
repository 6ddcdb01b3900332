"""One client's local training, written for one client; `round.py` maps it over many."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax


def local_training(
    loss_fn: Callable,
    optimizer: optax.GradientTransformation,
    adapter,
    base,
    batches,
    correction,
    rate,
):
    """Local steps from the global adapter, with a fresh optimizer.

    Args:
      loss_fn: `(adapter, base, batch) -> scalar`.
      optimizer: turns a gradient into a direction; the step is `-rate * direction`.
      adapter: global adapter at the start of the round.
      base: frozen base parameters.
      batches: pytree with leaves `[steps, rows, seq]`.
      correction: pytree added to every gradient (zero for FedAvg, `c - c_i` for SCAFFOLD).
      rate: learning rate of this round, scalar.

    Returns:
      `(local adapter, mean raw gradient, losses [steps])`.
    """

    def step(carry, batch):
        local, state, gradient_sum = carry
        loss, gradient = jax.value_and_grad(loss_fn)(local, base, batch)
        gradient_sum = jax.tree.map(jnp.add, gradient_sum, gradient)
        corrected = jax.tree.map(jnp.add, gradient, correction)
        direction, state = optimizer.update(corrected, state, local)
        # A step without targets (everything filtered) must not move: momentum would.
        active = (batch.mask.sum() > 0).astype(jnp.float32)
        local = jax.tree.map(lambda p, d: p - active * rate * d, local, direction)
        return (local, state, gradient_sum), loss

    start = (adapter, optimizer.init(adapter), jax.tree.map(jnp.zeros_like, adapter))
    (local, _, gradient_sum), losses = jax.lax.scan(step, start, batches)
    steps = losses.shape[0]
    return local, jax.tree.map(lambda g: g / steps, gradient_sum), losses
