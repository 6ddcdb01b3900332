"""Decompositions of stacked matrices: numpy's, and none that waits for another for ever."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from fedsafe_jax.federated import decompositions

# What `average="product"` computes for five clients of rank 16 and four projections.
SEVERAL = """
import jax, jax.numpy as jnp
from fedsafe_jax.federated import decompositions
x = jax.random.normal(jax.random.key(0), (4, 256, 80))
square = lambda x: (decompositions.svd(x), decompositions.det(x))
both = lambda x: (decompositions.qr(x), square(x[:, :80]))
function = jax.jit(lambda *each: [both(x) for x in each] + [jax.vmap(both)(x[None]) for x in each])
for _ in range(20):
    jax.block_until_ready(function(x, x + 1, 2 * x, x - 1))
print("done")
"""


def test_they_are_numpys():
    x = np.random.default_rng(0).normal(size=(3, 9, 5)).astype(np.float32)
    q, r = map(np.asarray, jax.jit(decompositions.qr)(x))
    u, s, vt = map(np.asarray, jax.jit(decompositions.svd)(x))
    # Entries of a few units: float32 sums of nine products.
    np.testing.assert_allclose(q @ r, x, atol=1e-5)
    np.testing.assert_allclose(
        q.swapaxes(1, 2) @ q, np.broadcast_to(np.eye(5), (3, 5, 5)), atol=1e-5
    )
    np.testing.assert_allclose((u * s[:, None]) @ vt, x, atol=1e-5)
    np.testing.assert_allclose(s, np.linalg.svd(x, compute_uv=False), rtol=1e-5)


def test_stacked_or_mapped_they_are_the_same():
    x = jax.random.normal(jax.random.key(0), (2, 3, 5, 5))
    for function in (decompositions.qr, decompositions.svd, decompositions.det):
        mapped = jax.vmap(function)(x)
        for stacked, each in zip(
            jax.tree.leaves(function(x)), jax.tree.leaves(mapped), strict=True
        ):
            np.testing.assert_array_equal(stacked, each)
    np.testing.assert_allclose(decompositions.det(x), np.linalg.det(np.asarray(x)), rtol=1e-4)


@pytest.mark.slow
def test_several_at_once_end():
    """In a process of its own, which can be ended; `jnp.linalg` itself did not on two cores."""
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL], capture_output=True, text=True, timeout=180, check=True
    )
    assert done.stdout == "done\n"
