"""Decompositions of stacked matrices, one matrix after another.

On CPU jaxlib shares a batch of matrices among the threads of XLA's pool, and waits for them in a
thread of that pool. Where a program has two such batches at once on a machine of two cores, each
may wait for a thread that the other one holds, and the program never ends (jax 0.10.2, from about
`[4, 256, 80]`). A single matrix is computed in the thread that asks for it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def _each(function: Callable, matrices: jax.Array):
    """Applies a function of one matrix to all, however they are stacked or mapped by `vmap`."""
    one = jax.custom_batching.sequential_vmap(function)
    stack = matrices.shape[:-2]
    results = jax.lax.map(one, matrices.reshape(-1, *matrices.shape[-2:]))
    return jax.tree.map(lambda x: x.reshape(*stack, *x.shape[1:]), results)


def qr(matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the reduced QR decompositions of matrices.

    Args:
      matrices: float32 `[..., rows, columns]`.

    Returns:
      `(Q [..., rows, k], R [..., k, columns])`, k the smaller side.
    """
    return _each(lambda x: tuple(jnp.linalg.qr(x)), matrices)


def svd(matrices: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the reduced singular value decompositions of matrices.

    Args:
      matrices: float32 `[..., rows, columns]`.

    Returns:
      `(U [..., rows, k], S [..., k], V^T [..., k, columns])`, k the smaller side; singular values
      descend.
    """
    return _each(lambda x: tuple(jnp.linalg.svd(x, full_matrices=False)), matrices)


def det(matrices: jax.Array) -> jax.Array:
    """Returns the determinants of square matrices, float32 `[...]`.

    Args:
      matrices: float32 `[..., side, side]`.
    """
    return _each(jnp.linalg.det, matrices)
