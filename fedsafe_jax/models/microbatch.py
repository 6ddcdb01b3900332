"""Gradients over packed rows, taken a few rows at a time: nobody pays for rows that are empty."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from fedsafe_jax.models.flatten_vmap import all_mapped, broadcast_unmapped
from fedsafe_jax.models.sharding import CLIENTS

# Tokens of a pass: on CPU what stays in a core's cache. Elsewhere all rows are one pass.
MICROBATCH_TOKENS = {"cpu": 256}
CPU_OPTIONS = {"xla_cpu_use_fusion_emitters": False}


def value_and_grad_in_microbatches(loss_fn: Callable, mesh: Mesh | None = None) -> Callable:
    """`jax.value_and_grad` of a loss over packed rows, taken a few rows at a time.

    As many passes are made as rows are filled, so that a shape which fits the largest batch costs
    no more than the batch at hand, and activations of one pass are held.

    Args:
      loss_fn: `(adapter, base, batch) -> scalar`, a `masked_mean` over `batch.mask`; `batch` is a
        `data.packing.Batch` with fields `[rows, seq]`, filled rows first.
      mesh: under `vmap` over adapters and batches, all their passes are one queue, dealt out to
        the devices along `clients`: none waits while another has a client left, or one with more
        rows. A row longer than `PASS_TOKENS` is cut to as many eighths as it fills, four at least.
        Every device has to hold all adapters and batches. None: `vmap` as usual.

    Returns:
      A function of the same arguments that returns `(value, gradient to the adapter)`.
    """
    value_and_grad = jax.value_and_grad(loss_fn)

    def passes(adapter, base, batch):
        rows = _rows(*batch.mask.shape)
        if len(batch.mask) == rows:
            return value_and_grad(adapter, base, batch)
        batch = _whole_passes(batch, rows)
        whole, filled = jnp.sum(batch.mask), jnp.sum(jnp.any(batch.segment_ids > 0, axis=1))

        def one(i, sums):
            part = _slice(batch, i * rows, rows)
            new = value_and_grad(adapter, base, part)
            return jax.tree.map(lambda x, y: x + _share(part, whole) * y, sums, new)

        zero = jnp.zeros(()), jax.tree.map(jnp.zeros_like, adapter)
        return jax.lax.fori_loop(0, -(-filled // rows), one, zero)

    return passes if mesh is None else _dealt_out(value_and_grad, passes, mesh)


@functools.cache
def compiler_options() -> dict | None:
    """For `jax.jit` of a program of passes: compiled in half the memory on CPU, and as fast.

    Passes of five widths are five programs, and with XLA's newer code generator compiling them
    takes more memory than training. None where the compiler does not know the option.
    """
    if jax.default_backend() != "cpu":
        return None
    try:
        jax.jit(lambda: 0, compiler_options=CPU_OPTIONS).lower().compile()
    except jax.errors.JaxRuntimeError:
        return None
    return CPU_OPTIONS


def _dealt_out(value_and_grad: Callable, passes: Callable, mesh: Mesh) -> Callable:
    """`passes`, which under `vmap` deals out those of all adapters to the devices."""
    devices = mesh.shape[CLIENTS]

    def cut(width, adapter, base, part):
        return value_and_grad(adapter, base, jax.tree.map(lambda x: x[:, :width], part))

    def queue(adapters, base, batches):
        """On each device, leaves `[clients, ...]`."""
        clients, count, seq = batches.mask.shape
        rows, widths = _rows(count, seq), _widths(seq)
        batches = jax.vmap(lambda x: _whole_passes(x, rows))(batches)
        whole = batches.mask.sum((1, 2))
        tokens = (batches.segment_ids > 0).reshape(clients, -1, rows * seq).sum(2)
        passes_each = tokens.shape[1]
        # The fullest first, so that devices end together.
        tokens, order = tokens.reshape(-1), jnp.argsort(-tokens.reshape(-1), stable=True)
        first = jax.lax.axis_index(CLIENTS) if devices > 1 else 0

        def one(i, sums):
            item = order[first + i * devices]
            client = item // passes_each
            adapter, batch = jax.tree.map(lambda x: x[client], (adapters, batches))
            part = _slice(batch, item % passes_each * rows, rows)
            if len(widths) > 1:
                width = jnp.searchsorted(jnp.array(widths), tokens[item])
                branches = [functools.partial(cut, w) for w in widths]
                new = jax.lax.switch(width, branches, adapter, base, part)
            else:
                new = value_and_grad(adapter, base, part)
            share = _share(part, whole[client])
            return jax.tree.map(lambda x, y: x.at[client].add(share * y), sums, new)

        zero = jnp.zeros(clients), jax.tree.map(jnp.zeros_like, adapters)
        mine = -(-(jnp.sum(tokens > 0) - first) // devices)
        sums = jax.lax.fori_loop(0, mine, one, zero)
        return jax.lax.psum(sums, CLIENTS) if devices > 1 else sums

    shared = queue
    if devices > 1:
        shared = jax.shard_map(
            queue, mesh=mesh, axis_names={CLIENTS}, in_specs=PartitionSpec(),
            out_specs=PartitionSpec(), check_vma=False,
        )  # fmt: skip
    dealt = jax.custom_batching.custom_vmap(passes)

    @dealt.def_vmap
    def rule(size, batched, adapter, base, batch):
        assert not any(jax.tree.leaves(batched[1])), "clients share one base"

        adapters, batches = broadcast_unmapped(size, (adapter, batch), (batched[0], batched[2]))
        results = shared(adapters, base, batches)
        return results, all_mapped(results)

    return dealt


def _rows(count: int, seq: int) -> int:
    """Of a pass, for a batch of so many."""
    return min(count, max(1, MICROBATCH_TOKENS.get(jax.default_backend(), count * seq) // seq))


def _widths(seq: int) -> tuple[int, ...]:
    """To which a pass of one long row is cut; each is a program, so that there are few."""
    long = seq > MICROBATCH_TOKENS.get(jax.default_backend(), seq)
    return tuple(seq * eighths // 8 for eighths in range(4, 9)) if long else (seq,)


def _whole_passes(batch, rows: int):
    """The batch with empty rows at its end, so that its passes are whole."""
    return jax.tree.map(lambda x: jnp.pad(x, ((0, -len(x) % rows), (0, 0))), batch)


def _slice(batch, start, rows: int):
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, rows), batch)


def _share(part, whole: jax.Array) -> jax.Array:
    """Of a pass's mean in that of a batch with so many learned tokens."""
    return jnp.maximum(jnp.sum(part.mask), 1) / jnp.maximum(whole, 1)
