"""Safe LoRA: what an adapter does is brought back into the subspace in which alignment happened.

"Safe LoRA: the Silver Lining of Reducing Safety Risks when Fine-tuning Large Language Models" (Hsu
et al., 2024, arXiv 2405.16833). With `V = W_aligned - W_unaligned` of a projection and
`C = V V^T / |V|_F`, the adapter's `Delta W` becomes `C Delta W` where the cosine of the two is at
most a threshold, and stays what it is elsewhere. It needs neither data nor training.

`C` is the paper's, in place of the costly projector onto V's columns. Its size is that of V: it
shrinks what it projects where alignment moved the weights little, and applied again it does more,
so it is applied once. Neither `V V^T` nor a `Delta W` is ever formed.
"""

import math

import numpy as np


def project(
    a: np.ndarray, b: np.ndarray, moved: np.ndarray, threshold: float
) -> tuple[np.ndarray, float]:
    """Projects one adapted projection of one layer.

    Args:
      a: float32 `[in, rank]`.
      b: float32 `[rank, out]`; the adapter adds `a @ b` to the kernel `[in, out]`.
      moved: float32 `[out, in]`, V, as the tensors of a checkpoint lie.
      threshold: largest cosine at which it is projected, 0 to 1.

    Returns:
      `(b, cosine)`: the factor after the step, and the cosine of `Delta W` and `C Delta W`, from 0
      to 1 as C has no negative eigenvalue. NaN, and `b` as it was, where either matrix is zero:
      there is no subspace, or nothing to project.
    """
    length = float(np.linalg.norm(moved))
    if not length:
        return b, math.nan
    projected = (b @ moved) @ moved.T / np.float32(length)
    gram = a.T.astype(np.float64) @ a

    def inner(x, y):  # of `a @ x` and `a @ y`
        return float(np.sum((gram @ x) * y))

    before, after = inner(b, b), inner(projected, projected)
    if before <= 0:
        return b, math.nan
    cosine = inner(b, projected) / math.sqrt(before * after) if after > 0 else 0.0
    return (projected if cosine <= threshold else b), cosine
