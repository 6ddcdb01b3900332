"""Gradients over packed rows in microbatches (gradient accumulation), without the empty rows.

A batch has the shape of the largest batch of a run, and most batches fill only part of their rows.
The rows are split into microbatches of a few rows, and only the filled ones are computed. On CPU a
microbatch is what stays in a core's cache; elsewhere all rows are one microbatch.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from fedsafe_jax.models.flatten_vmap import MICROBATCHES, all_mapped, broadcast_unmapped
from fedsafe_jax.models.sharding import CLIENTS, platform_of

# Tokens of a microbatch by platform; where a platform is missing, all rows are one microbatch.
MICROBATCH_TOKENS = {"cpu": 256}
CPU_OPTIONS = {"xla_cpu_use_fusion_emitters": False}


def value_and_grad_in_microbatches(
    loss_fn: Callable, mesh: Mesh | None = None, platform: str | None = None
) -> Callable:
    """Returns `jax.value_and_grad` of a loss over packed rows, computed in microbatches.

    As many microbatches are computed as rows are filled, so a batch in the shape of the largest
    one costs no more than its own rows, and only one microbatch's activations are held.

    Args:
      loss_fn: `(factors, base, batch) -> scalar`, a `masked_mean` over `batch.mask`; `batch` is a
        `data.packing.Batch` with fields `[rows, seq]`, filled rows first.
      mesh: under `vmap` over factors and batches, the microbatches of all clients are one queue,
        dealt out to the devices along `clients`, so no device is idle while another has
        microbatches left. A microbatch of one row longer than `MICROBATCH_TOKENS` is truncated to
        one of `_widths`. Every device has to hold all factors and batches. None: `vmap` as usual.
      platform: platform of the devices that compute, see `sharding.platform_of`; None for that of
        `mesh`.

    Returns:
      A function `(factors, base, batch) -> (value, gradient with respect to factors)`.
    """
    value_and_grad = jax.value_and_grad(loss_fn)
    tokens = MICROBATCH_TOKENS.get(platform or platform_of(mesh))
    one_client = functools.partial(_sum_over_microbatches, value_and_grad, tokens)
    if mesh is None:
        return one_client
    return _deal_out_under_vmap(one_client, value_and_grad, mesh, tokens)


def count_on(mask: jax.Array, axis: tuple[int, ...] | None = None) -> jax.Array:
    """Counts the places where a mask is on, float32: its sum, where it has no weights but 1.

    Args:
      mask: float32 or bool, any shape.
      axis: axes that are counted over; None for all.
    """
    return jnp.sum(mask != 0, axis=axis, dtype=jnp.float32)


@functools.cache
def compiler_options(platform: str) -> dict | None:
    """Returns options for `jax.jit` of a program of microbatches, None for the defaults.

    Microbatches of five widths are five programs in one, and XLA's newer code generator for CPU
    takes more memory to compile them than training takes. The older one takes half, and its code is
    as fast. None on other platforms, and where the compiler does not know the option.

    Args:
      platform: platform that the program is compiled for, see `sharding.platform_of`.
    """
    if platform != "cpu":
        return None
    try:
        jax.jit(lambda: 0, compiler_options=CPU_OPTIONS).lower().compile()
    except jax.errors.JaxRuntimeError:
        return None
    return CPU_OPTIONS


def _sum_over_microbatches(value_and_grad: Callable, tokens: int | None, factors, base, batch):
    """Computes value and gradient of one client's batch, with fields `[rows, seq]`."""
    rows = _rows_per_microbatch(*batch.mask.shape, tokens)
    if len(batch.mask) == rows:
        return value_and_grad(factors, base, batch)
    batch = _pad_to_whole_microbatches(batch, rows)
    num_targets = count_on(batch.mask)
    num_filled = jnp.sum(jnp.any(batch.segment_ids > 0, axis=1))

    def add_microbatch(i, sums):
        part = _slice_rows(batch, i * rows, rows)
        new = value_and_grad(factors, base, part)
        return jax.tree.map(lambda x, y: x + _target_fraction(part, num_targets) * y, sums, new)

    zero = jnp.zeros(()), jax.tree.map(jnp.zeros_like, factors)
    with jax.named_scope(MICROBATCHES):
        return jax.lax.fori_loop(0, -(-num_filled // rows), add_microbatch, zero)


def _deal_out_under_vmap(
    one_client: Callable, value_and_grad: Callable, mesh: Mesh, tokens: int | None
) -> Callable:
    """Returns `one_client`, which under `vmap` deals out all clients' microbatches to devices.

    This is not `flatten_vmap`, which needs rows that depend on shared arguments alone: here each
    row needs the factors of its client, and the gradient of each client is a sum of its own. So
    the rule keeps the axis of clients and gives it to a queue; broadcasting is shared.

    Args:
      one_client: `(factors, base, batch) -> (value, gradient)`, fields of `batch` `[rows, seq]`.
      value_and_grad: the same for one microbatch.
      mesh: has the axis `clients`.
      tokens: tokens of a microbatch, see `_rows_per_microbatch`.
    """
    devices = mesh.shape[CLIENTS]
    all_clients = functools.partial(_queue, value_and_grad, devices, tokens)
    if devices > 1:
        all_clients = jax.shard_map(
            all_clients, mesh=mesh, axis_names={CLIENTS}, in_specs=PartitionSpec(),
            out_specs=PartitionSpec(), check_vma=False,
        )  # fmt: skip
    dealt_out = jax.custom_batching.custom_vmap(one_client)

    @dealt_out.def_vmap
    def rule(size, is_mapped, factors, base, batch):
        assert not any(jax.tree.leaves(is_mapped[1])), "clients share one base"
        factors, batch = broadcast_unmapped(size, (factors, batch), (is_mapped[0], is_mapped[2]))
        results = all_clients(factors, base, batch)
        return results, all_mapped(results)

    return dealt_out


def _queue(
    value_and_grad: Callable, devices: int, tokens: int | None, client_factors, base, batches
):
    """Computes this device's share of all clients' microbatches, and sums over devices.

    Args:
      value_and_grad: of one microbatch.
      devices: number of devices along `clients`; one takes the whole queue.
      tokens: tokens of a microbatch, see `_rows_per_microbatch`.
      client_factors: LoRA factors with a leading `[clients]`.
      base: base parameters.
      batches: `data.packing.Batch` with fields `[clients, rows, seq]`.

    Returns:
      `(values float32 [clients], gradients like client_factors)`, the same on every device.
    """
    clients, count, seq = batches.mask.shape
    rows, widths = _rows_per_microbatch(count, seq, tokens), _widths(seq, tokens)
    batches = jax.vmap(lambda x: _pad_to_whole_microbatches(x, rows))(batches)
    num_targets = count_on(batches.mask, (1, 2))
    num_tokens = (batches.segment_ids > 0).reshape(clients, -1, rows * seq).sum(2)
    microbatches_per_client = num_tokens.shape[1]
    # Longest first: the last ones to be dealt out are short, so devices finish together.
    num_tokens = num_tokens.reshape(-1)
    order = jnp.argsort(-num_tokens, stable=True)
    first = jax.lax.axis_index(CLIENTS) if devices > 1 else 0

    def add_microbatch(i, sums):
        item = order[first + i * devices]
        client = item // microbatches_per_client
        factors, batch = jax.tree.map(lambda x: x[client], (client_factors, batches))
        part = _slice_rows(batch, item % microbatches_per_client * rows, rows)
        if len(widths) > 1:
            width = jnp.searchsorted(jnp.array(widths), num_tokens[item])
            branches = [functools.partial(_truncated, value_and_grad, w) for w in widths]
            new = jax.lax.switch(width, branches, factors, base, part)
        else:
            new = value_and_grad(factors, base, part)
        fraction = _target_fraction(part, num_targets[client])
        return jax.tree.map(lambda x, y: x.at[client].add(fraction * y), sums, new)

    zero = jnp.zeros(clients), jax.tree.map(jnp.zeros_like, client_factors)
    # Empty microbatches are at the end of the queue, and are not computed.
    length = -(-(jnp.sum(num_tokens > 0) - first) // devices)
    with jax.named_scope(MICROBATCHES):
        sums = jax.lax.fori_loop(0, length, add_microbatch, zero)
    return jax.lax.psum(sums, CLIENTS) if devices > 1 else sums


def _truncated(value_and_grad: Callable, width: int, factors, base, part):
    """Computes value and gradient of a microbatch whose rows are truncated to `width` tokens."""
    return value_and_grad(factors, base, jax.tree.map(lambda x: x[:, :width], part))


def _rows_per_microbatch(count: int, seq: int, tokens: int | None) -> int:
    """Returns the number of rows per microbatch.

    Args:
      count, seq: rows of the batch, and tokens of a row.
      tokens: tokens of a microbatch; None: all rows are one.
    """
    return count if tokens is None else min(count, max(1, tokens // seq))


def _widths(seq: int, tokens: int | None) -> tuple[int, ...]:
    """Returns the widths a long row may be truncated to: four to eight eighths of `seq`.

    Each width is compiled separately, so there are five. Short rows have one width, their own.
    """
    is_long = tokens is not None and seq > tokens
    return tuple(seq * eighths // 8 for eighths in range(4, 9)) if is_long else (seq,)


def _pad_to_whole_microbatches(batch, rows: int):
    """Adds empty rows at the end, so that the number of rows is a multiple of `rows`."""
    return jax.tree.map(lambda x: jnp.pad(x, ((0, -len(x) % rows), (0, 0))), batch)


def _slice_rows(batch, start: jax.Array, rows: int):
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, rows), batch)


def _target_fraction(part, num_targets: jax.Array) -> jax.Array:
    """Returns the fraction of the batch's target tokens that fall in this microbatch."""
    return jnp.maximum(count_on(part.mask), 1) / jnp.maximum(num_targets, 1)
