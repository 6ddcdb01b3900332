"""Decompositions of stacked matrices, one matrix after another.

On CPU jaxlib shares a batch of matrices among the threads of XLA's pool, and waits for them in a
thread of that pool. Where a program has two such batches at once on a machine of two cores, each
may wait for a thread that the other one holds, and the program never ends (jax 0.10.2, from about
`[4, 256, 80]`). A single matrix is computed in the thread that asks for it.
"""

import jax
import jax.numpy as jnp


def qr(matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the reduced QR decompositions of matrices.

    Args:
      matrices: float32 `[count, rows, columns]`.

    Returns:
      `(Q [count, rows, k], R [count, k, columns])`, k the smaller side.
    """
    return jax.lax.map(lambda x: tuple(jnp.linalg.qr(x)), matrices)


def svd(matrices: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the reduced singular value decompositions of matrices.

    Args:
      matrices: float32 `[count, rows, columns]`.

    Returns:
      `(U [count, rows, k], S [count, k], V^T [count, k, columns])`, k the smaller side; singular
      values descend.
    """
    return jax.lax.map(lambda x: tuple(jnp.linalg.svd(x, full_matrices=False)), matrices)
