"""Safe LoRA's projection against the paper's dense formula, in float64."""

import math

import numpy as np
import pytest

from fedsafe_jax.federated import safe_lora

IN, OUT, RANK = 9, 7, 3
RNG = np.random.default_rng(0)
A = RNG.normal(size=(IN, RANK)).astype(np.float32)
B = RNG.normal(size=(RANK, OUT)).astype(np.float32)
V = RNG.normal(size=(OUT, IN)).astype(np.float32)


def dense(v):
    """`(C Delta W, cosine)` as the paper writes it, `Delta W` being `[out, in]`."""
    v = v.astype(np.float64)
    c, delta = v @ v.T / np.linalg.norm(v), (A.astype(np.float64) @ B).T
    projected = c @ delta
    return projected, np.sum(projected * delta) / np.linalg.norm(projected) / np.linalg.norm(delta)


@pytest.mark.parametrize("moved", [V, 0.01 * V, V[:, :1] @ RNG.normal(size=(1, IN))])
def test_the_projection_is_the_papers(moved):
    moved = moved.astype(np.float32)
    projected, cosine = dense(moved)
    assert 0.05 < cosine < 0.95
    b, found = safe_lora.project(A, B, moved, cosine + 1e-3)
    assert found == pytest.approx(cosine, rel=1e-5)  # products of float32
    np.testing.assert_allclose((A @ b).T, projected, rtol=1e-4, atol=1e-5 * np.abs(projected).max())
    kept, found = safe_lora.project(A, B, moved, cosine - 1e-3)
    assert kept is B and found == pytest.approx(cosine, rel=1e-5)


def test_what_lies_in_the_subspace_is_kept_and_what_lies_outside_goes():
    """For V of equal singular values C is a multiple of the projector onto its columns."""
    columns = np.linalg.qr(RNG.normal(size=(OUT, 2)))[0]
    moved = (columns @ np.linalg.qr(RNG.normal(size=(IN, 2)))[0].T).astype(np.float32)
    inside = (RNG.normal(size=(RANK, 2)) @ columns.T).astype(np.float32)
    kept, cosine = safe_lora.project(A, inside, moved, 0.999)
    assert kept is inside and cosine == pytest.approx(1.0, abs=1e-6)
    outside = (B - B @ columns @ columns.T).astype(np.float32)
    gone, cosine = safe_lora.project(A, outside, moved, 0.5)
    assert cosine < 0.5 and np.abs(gone).max() < 1e-6  # of entries of about 1


def test_nothing_moves_without_a_subspace_or_an_update():
    for b, moved in ((B, np.zeros_like(V)), (np.zeros_like(B), V)):
        kept, cosine = safe_lora.project(A, b, moved, 1.0)
        assert kept is b and math.isnan(cosine)
