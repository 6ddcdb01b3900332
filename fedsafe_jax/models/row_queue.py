"""The rows of all clients in one queue, each with its client's adapter: no client pads another.

A batch has as many rows as the fullest one of a round, so of the rows of clients that `vmap` puts
side by side about half are empty. A client's training is written for one client nevertheless, and
mapped by `vmap`; the gradient of the loss has a rule of its own for it, which moves the filled rows
of all clients together into slots, and computes those alone (`by_owner`). On several devices slots
are dealt out whoever owns their rows, so devices have the same work whatever clients there are.

How many rows are filled is data, and shapes are not: a step takes the smallest of a few numbers of
slots that holds its rows. On CPU a queue of another kind costs less (`microbatch`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from fedsafe_jax.models.flatten_vmap import all_mapped, broadcast_unmapped
from fedsafe_jax.models.microbatch import count_on
from fedsafe_jax.models.sharding import CLIENTS, manual_axes

SLOTS = "slots"  # name of the choice among numbers of slots in compiled programs
# Numbers of slots of a program, in proportion, the largest first. Where all clients do all steps,
# the sums over clients are alike; where they stop early, sums fall to nothing.
LADDERS = ((8, 7, 6), (3, 2, 1))


def choose_slots(totals: np.ndarray, devices: int = 1) -> tuple[int, ...]:
    """Chooses the numbers of slots of a round's program, from the filled rows of its steps.

    The largest is that of the fullest step, rounded up to sixteenths of a power of two, so that few
    programs are compiled in all rounds; the others are one of `LADDERS` below it.

    Args:
      totals: int, any shape: filled rows of each gradient, those of all its clients together.
      devices: devices that share the slots; each number is a multiple of it.

    Returns:
      One to three numbers, ascending; each total is at most the last.
    """

    def rounded(count: int) -> int:
        count = max(1, count)
        unit = max(1, (1 << (count - 1).bit_length()) // 16)
        unit = -(-unit // devices) * devices
        return -(-count // unit) * unit

    largest = rounded(int(np.max(totals, initial=1)))
    ladders = [
        tuple(sorted({rounded(-(-step * largest // ladder[0])) for step in ladder}))
        for ladder in LADDERS
    ]
    return min(ladders, key=lambda slots: computed(totals, slots).sum())


def computed(totals: np.ndarray, slots: Sequence[int]) -> np.ndarray:
    """Returns the slots that are computed for each total, int in the shape of `totals`.

    Args:
      totals: int, filled rows of each gradient, at most the last of `slots`.
      slots: numbers of slots, ascending.
    """
    return np.asarray(slots)[np.searchsorted(slots, totals)]


def value_and_grad_in_queue(
    loss_fn: Any, slots: Sequence[int] = (), mesh: Mesh | None = None
) -> Callable:
    """Returns `jax.value_and_grad` of a loss over packed rows, which `vmap` computes in one queue.

    Args:
      loss_fn: `(factors, base, batch) -> scalar`, with a method `by_owner` and the `dtype` that
        factors are rounded to, such as `loss.PackedLoss`.
      slots: numbers of slots, ascending, see `choose_slots`. Under `vmap` no more rows may be
        filled than the last says. () for all rows, empty ones too.
      mesh: devices that the slots are dealt out to along `clients`; the mapped axis is then a
        multiple of their number, and the results lie split along it. None: all on this device.

    Returns:
      A function `(factors, base, batch) -> (value, gradient with respect to factors)`.
    """
    of_one = jax.value_and_grad(loss_fn)
    devices = 1 if mesh is None else mesh.shape[CLIENTS]
    queue = functools.partial(_queue, loss_fn, tuple(slots), devices)
    if mesh is not None and mesh.size > 1:
        split = PartitionSpec(CLIENTS)
        queue = jax.shard_map(
            queue, mesh=mesh, axis_names=manual_axes(mesh), check_vma=False,
            in_specs=(split, PartitionSpec(), PartitionSpec(), split), out_specs=split,
        )  # fmt: skip
    queued = jax.custom_batching.custom_vmap(of_one)

    @queued.def_vmap
    def rule(size, is_mapped, factors, base, batch):
        assert not any(jax.tree.leaves(is_mapped[1])), "clients share one base"
        factors, batch = broadcast_unmapped(size, (factors, batch), (is_mapped[0], is_mapped[2]))
        results = queue(factors, base, batch, jnp.arange(devices))
        return results, all_mapped(results)

    return queued


def _queue(
    loss_fn: Any, slots: tuple[int, ...], devices: int, factors: Any, base: Any, batches, number
) -> tuple[jax.Array, Any]:
    """Computes this device's share of the rows of all clients.

    Args:
      loss_fn, slots: as in `value_and_grad_in_queue`.
      devices: devices that share the rows.
      factors: LoRA factors of this device's clients, leading `[clients / devices]`.
      base: base parameters.
      batches: `data.packing.Batch` of all clients, fields `[clients, rows, seq]`.
      number: int32 `[1]`, this device's place among them.

    Returns:
      `(values float32 [clients / devices], gradients like factors)`.
    """
    clients, rows, seq = batches.mask.shape
    slots = slots or (-(-clients * rows // devices) * devices,)
    targets = count_on(batches.mask, (1, 2))
    is_filled = jnp.any(batches.segment_ids > 0, axis=2).reshape(-1)
    # Filled rows first. Slots beyond the last row have nothing in them, as have empty rows.
    missing = max(0, slots[-1] - clients * rows)
    order = jnp.argsort(~jnp.pad(is_filled, (0, missing)), stable=True)
    flat = jax.tree.map(lambda x: jnp.pad(x.reshape(-1, seq), ((0, missing), (0, 0))), batches)
    if devices > 1:
        factors = jax.tree.map(functools.partial(_gather, loss_fn.dtype), factors)

    def value(factors, owner, batch):
        losses = loss_fn.by_owner(factors, base, batch, owner, targets)
        # A client's loss depends on its own factors alone: the gradient of the sum is each one's.
        return jnp.sum(losses), losses

    def compute(count, factors):
        # Neighbours go to different devices, as target tokens, and so logits, are a client's.
        mine = jax.lax.dynamic_index_in_dim(
            order[:count].reshape(-1, devices), number[0], axis=1, keepdims=False
        )
        owner = jnp.minimum(mine // rows, clients - 1).astype(jnp.int32)
        batch = jax.tree.map(lambda x: x[mine], flat)
        (_, losses), gradients = jax.value_and_grad(value, has_aux=True)(factors, owner, batch)
        return losses, gradients

    branches = [functools.partial(compute, count) for count in slots]
    with jax.named_scope(SLOTS):
        results = jax.lax.switch(
            jnp.searchsorted(jnp.array(slots), jnp.sum(is_filled)), branches, factors
        )
    if devices > 1:
        results = jax.tree.map(
            lambda x: jax.lax.psum_scatter(x, CLIENTS, scatter_dimension=0, tiled=True), results
        )
    return results


def _gather(dtype: Any, x: jax.Array) -> jax.Array:
    """Gathers factors from all devices; they travel in `dtype`, which rows round them to."""
    return jax.lax.all_gather(x.astype(dtype), CLIENTS, axis=0, tiled=True).astype(x.dtype)
