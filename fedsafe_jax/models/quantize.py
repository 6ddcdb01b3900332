"""Weight-only quantisation of the frozen base: int8, and NF4 of QLoRA (arXiv 2305.14314).

Kernels of the linear projections are quantised; embeddings, output matrix, norms and adapters keep
their precision. A quantised kernel is expanded where it is used, inside the matrix product's
fusion. No library is used: qwix, the maintained one, imports a part of flax that does not work with
jax 0.11.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import DTypeLike

from fedsafe_jax.models.decoder_config import ModelError

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
      codes: int8 `[..., in, out]`; for nf4 uint8 `[..., in/2, out]`, two levels in a byte, the
        first one in the low bits.
      scale: float32 `[..., 1, out]` (int8), `[..., in/64, out]` (nf4).
      kind: one of `KINDS`.
    """

    codes: jax.Array
    scale: jax.Array
    kind: str = struct.field(pytree_node=False)


@functools.partial(jax.jit, static_argnames="kind")
def quantize(kernel: jax.Array, kind: str) -> Quantized:
    """Rounds a kernel `[..., in, out]` to the nearest level of its column (int8) or block (nf4).

    Raises:
      ModelError: unknown kind, or for nf4 an input size that is no multiple of 64.
    """
    kernel = kernel.astype(jnp.float32)
    if kind == "int8":
        scale = jnp.max(jnp.abs(kernel), axis=-2, keepdims=True) / 127.0
        codes = jnp.round(kernel / jnp.where(scale == 0, 1.0, scale)).astype(jnp.int8)
        return Quantized(codes, scale, kind)
    if kind != "nf4":
        raise ModelError(f"quantization '{kind}': expected {' or '.join(KINDS)}.")
    *lead, fan_in, fan_out = kernel.shape
    if fan_in % NF4_BLOCK:
        raise ModelError(
            f"quantization 'nf4': input size {fan_in} is no multiple of {NF4_BLOCK}; use int8."
        )
    blocks = kernel.reshape(*lead, fan_in // NF4_BLOCK, NF4_BLOCK, fan_out)
    scale = jnp.max(jnp.abs(blocks), axis=-2, keepdims=True)
    unit = (blocks / jnp.where(scale == 0, 1.0, scale)).reshape(kernel.shape)
    borders = (NF4_LEVELS[1:] + NF4_LEVELS[:-1]) / 2
    codes = jnp.searchsorted(borders, unit).astype(jnp.uint8)
    packed = codes[..., 0::2, :] | (codes[..., 1::2, :] << 4)
    return Quantized(packed, scale[..., 0, :], kind)


def dequantize(kernel: jax.Array | Quantized, dtype: DTypeLike) -> jax.Array:
    """Returns the kernel `[..., in, out]` in `dtype`; an array is only cast."""
    if not isinstance(kernel, Quantized):
        return kernel.astype(dtype)
    if kernel.kind == "int8":
        return (kernel.codes.astype(jnp.float32) * kernel.scale).astype(dtype)
    *lead, half, fan_out = kernel.codes.shape
    pairs = jnp.stack([kernel.codes & 15, kernel.codes >> 4], axis=-2)  # [..., in/2, 2, out]
    levels = jnp.asarray(NF4_LEVELS)[pairs.astype(jnp.int32)]
    blocks = levels.reshape(*lead, -1, NF4_BLOCK, fan_out) * kernel.scale[..., None, :]
    return blocks.reshape(*lead, 2 * half, fan_out).astype(dtype)


def matmul(x: jax.Array, kernel: jax.Array | Quantized) -> jax.Array:
    """Computes `x @ kernel` in the dtype of `x`; every projection of the decoder calls it.

    Args:
      x: `[..., in]`.
      kernel: `[in, out]`, an array or quantised.

    Returns:
      `[..., out]`.
    """
    if isinstance(kernel, Quantized) and kernel.kind == "int8":
        # Each column's scale is applied to the product: codes alone are exact in bfloat16.
        return (x @ kernel.codes.astype(x.dtype)) * kernel.scale[0].astype(x.dtype)
    return x @ dequantize(kernel, x.dtype)


def quantize_params(params: dict, kind: str) -> dict:
    """Quantises the kernels of all projections in the base parameters."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: quantize(leaf, kind) if path[-1].key == "kernel" else leaf, params
    )


def num_bytes(params: Any) -> int:
    """Returns the number of bytes that a pytree of arrays, or of their shapes, takes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
