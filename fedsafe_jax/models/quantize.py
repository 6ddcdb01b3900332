"""Weight-only quantisation of the frozen base: int8, and NF4 of QLoRA (arXiv 2305.14314).

Kernels of the linear projections are quantised; embeddings, output matrix, norms and adapters keep
their precision. A quantised kernel is expanded where it is used, one projection of one layer at a
time, and again in the backward pass, so that the base never lies expanded in memory. int8 codes
are converted inside the matrix product's fusion; NF4's kernel is written out before the product:
for 4096 x 14336 in bfloat16, 112 MiB of temporaries compiled for an H100 and 224 MiB for a v5p. No
library is used: qwix, the maintained one, imports a part of flax that does not work with jax 0.11.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import DTypeLike

from fedsafe_jax.models.decoder_config import ModelError
from fedsafe_jax.models.precision import own_precision

KINDS = ("int8", "nf4")
NF4_BLOCK = 64  # weights that share a scale, along the input axis

# The 16 levels of NF4: quantiles of a standard normal, normalised to [-1, 1] with an exact zero
# (arXiv 2305.14314, appendix E).
NF4_LEVELS = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip


@struct.dataclass
class Quantized:
    """Quantised kernel `[..., in, out]`.

    Attributes:
      codes: int8 `[..., in, out]`; for nf4 uint8 `[..., in/2, out]`, two levels in a byte: in the
        low bits one of the first half of a block, in the high bits one of the second half.
      scale: float32 `[..., 1, out]` (int8), `[..., in/64, out]` (nf4).
      kind: one of `KINDS`.
    """

    codes: jax.Array
    scale: jax.Array
    kind: str = struct.field(pytree_node=False)


@functools.partial(jax.jit, static_argnames="kind")
def quantize(kernel: jax.Array, kind: str) -> Quantized:
    """Rounds a kernel `[..., in, out]` to the nearest level of its column (int8) or block (nf4).

    Stacked kernels are rounded layer by layer.

    Raises:
      ModelError: unknown kind, or for nf4 an input size that is no multiple of 64.
    """
    if kernel.ndim > 2:
        # NF4 takes float32 and int32 copies of what it rounds: 50 GiB for all layers of a
        # projection of Llama-3.1-8B at once.
        return jax.lax.map(functools.partial(quantize, kind=kind), kernel)
    kernel = kernel.astype(jnp.float32)
    if kind == "int8":
        scale = jnp.max(jnp.abs(kernel), axis=-2, keepdims=True) / 127.0
        codes = jnp.round(kernel / jnp.where(scale == 0, 1.0, scale)).astype(jnp.int8)
        return Quantized(codes, scale, kind)
    if kind != "nf4":
        raise ModelError(f"quantization '{kind}': expected {' or '.join(KINDS)}.")
    fan_in, fan_out = kernel.shape
    if fan_in % NF4_BLOCK:
        raise ModelError(
            f"quantization 'nf4': input size {fan_in} is no multiple of {NF4_BLOCK}; use int8."
        )
    blocks = kernel.reshape(fan_in // NF4_BLOCK, NF4_BLOCK, fan_out)
    scale = jnp.max(jnp.abs(blocks), axis=1, keepdims=True)
    borders = (NF4_LEVELS[1:] + NF4_LEVELS[:-1]) / 2
    unit = blocks / jnp.where(scale == 0, 1.0, scale)
    # Comparisons fuse with all around them; a search would write float32 and int32 copies.
    codes = sum((unit > border).astype(jnp.uint8) for border in borders)
    first, second = jnp.split(codes, 2, axis=1)
    return Quantized((first | second << 4).reshape(fan_in // 2, fan_out), scale[:, 0], kind)


def dequantize(kernel: jax.Array | Quantized, dtype: DTypeLike) -> jax.Array:
    """Returns the kernel `[..., in, out]` in `dtype`; an array is only cast."""
    if not isinstance(kernel, Quantized):
        return kernel.astype(dtype)
    if kernel.kind == "int8":
        return (kernel.codes.astype(jnp.float32) * kernel.scale).astype(dtype)
    *lead, rows, fan_out = kernel.codes.shape
    scale = jnp.repeat(kernel.scale, NF4_BLOCK // 2, axis=-2)

    def expand(codes):
        half = (jnp.asarray(NF4_LEVELS)[codes.astype(jnp.int32)] * scale).astype(dtype)
        return half.reshape(*lead, -1, NF4_BLOCK // 2, fan_out)

    # Both halves of the blocks are joined in their final type: on a TPU this takes half the
    # memory of joining codes or float32.
    blocks = jnp.concatenate([expand(kernel.codes & 15), expand(kernel.codes >> 4)], axis=-2)
    return blocks.reshape(*lead, 2 * rows, fan_out)


def matmul(x: jax.Array, kernel: jax.Array | Quantized) -> jax.Array:
    """Computes `x @ kernel` in the dtype of `x`; every projection of the decoder calls it.

    A quantised kernel is frozen: only `x` has a gradient.

    Args:
      x: `[..., in]`.
      kernel: `[in, out]`, an array or quantised.

    Returns:
      `[..., out]`.
    """
    if isinstance(kernel, Quantized):
        return _quantized_product(x, kernel)
    return x @ kernel.astype(x.dtype)


@jax.custom_vjp
def _quantized_product(x: jax.Array, kernel: Quantized) -> jax.Array:
    if kernel.kind == "int8":
        # Each column's scale is applied to the product: codes alone are exact in bfloat16.
        return (x @ kernel.codes.astype(x.dtype)) * kernel.scale[0].astype(x.dtype)
    return x @ dequantize(kernel, x.dtype)


def _forward(x, kernel):
    # Without this rule autodiff would keep the expanded kernels of all layers from the forward to
    # the backward pass: the whole base in bfloat16.
    return _quantized_product(x, kernel), kernel


def _backward(kernel, gradient):
    dtype = gradient.dtype
    with own_precision(dtype):
        if kernel.kind == "int8":
            gradient = gradient * kernel.scale[0].astype(dtype)
            return gradient @ kernel.codes.astype(dtype).T, None
        return gradient @ dequantize(kernel, dtype).T, None


_quantized_product.defvjp(_forward, _backward)


def quantize_params(params: dict, kind: str) -> dict:
    """Quantises the kernels of all projections in the base parameters."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: quantize(leaf, kind) if path[-1].key == "kernel" else leaf, params
    )


def num_bytes(params: Any) -> int:
    """Returns the number of bytes that a pytree of arrays, or of their shapes, takes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
