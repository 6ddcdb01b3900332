"""Functions that `vmap` over clients turns into one call with more rows: why a round is fast.

A round trains the adapters of many clients over one frozen base. Only the LoRA factors and the
data are mapped over clients; the base is not (`in_axes=None`). So XLA merges
`clients x batch x seq` into one large matrix product per base weight, in which each weight is read
once for all clients, and only the small LoRA products are batched by client.

XLA does that by itself where the length of every loop is fixed, as it is over layers. Some loops of
this package have a length that is data: over the chunks that the target tokens fill (`loss`), the
pairs of blocks that share a segment (`block_attention`), the microbatches that the rows fill
(`microbatch`). Under plain `vmap` that length would be mapped over: every turn would run for all
clients until the longest client is done, and each turn would select between the old and the new
value of everything that the loop carries, which is a copy. `flatten_vmap` gives such a loop another
rule: the rows of all clients become the rows of one call, and one loop runs over the work of all.
`microbatch` has a rule of its own, because there each row needs its client's factors.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Names of two of these loops in compiled programs: who counts operations has to be told their turns
# (`aot.hlo`).
TARGET_CHUNKS, MICROBATCHES = "target_chunks", "microbatches"


def flatten_vmap(function: Callable, num_shared: int = 0) -> Callable:
    """Returns `function` with a rule for `vmap` that calls it once, with the rows of all clients.

    Arguments that are not mapped are broadcast, `[clients, rows, ...]` is reshaped to
    `[clients * rows, ...]`, and the results are reshaped back. A nested `vmap` is flattened too.

    Args:
      function: `(*shared, *arrays) -> pytree`. The leaves of `arrays` and of the result are
        `[rows, ...]`, and each row of the result depends on `shared` and on the same row alone.
      num_shared: number of leading arguments that belong to all rows (the base). When one of them
        is mapped nevertheless, `function` is mapped as usual.
    """
    flattened = jax.custom_batching.custom_vmap(function)

    @flattened.def_vmap
    def rule(size, is_mapped, *arguments):
        is_mapped = tuple(is_mapped)
        if any(jax.tree.leaves(is_mapped[:num_shared])):
            axes = jax.tree.map(lambda mapped: 0 if mapped else None, is_mapped)
            results = jax.vmap(function, axes, axis_size=size)(*arguments)
            return results, all_mapped(results)
        shared, arrays = arguments[:num_shared], arguments[num_shared:]
        arrays = broadcast_unmapped(size, arrays, is_mapped[num_shared:])
        rows = jax.tree.leaves(arrays)[0].shape[1]
        arrays = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), arrays)
        results = flattened(*shared, *arrays)
        results = jax.tree.map(lambda x: x.reshape(size, rows, *x.shape[1:]), results)
        return results, all_mapped(results)

    return flattened


def broadcast_unmapped(size: int, tree: Any, is_mapped: Any) -> Any:
    """Returns a pytree whose leaves all have a leading axis of `size`.

    Args:
      size: number of clients.
      tree: arguments of a `custom_vmap` rule, a pytree of arrays.
      is_mapped: the rule's flags, a bool per leaf of `tree`: whether it has the axis already.
    """

    def broadcast(leaf, mapped):
        return leaf if mapped else jnp.broadcast_to(leaf, (size, *leaf.shape))

    return jax.tree.map(broadcast, tree, is_mapped)


def all_mapped(results: Any) -> Any:
    """Returns the flags of a `custom_vmap` rule whose results all have the mapped axis first."""
    return jax.tree.map(lambda _: True, results)
