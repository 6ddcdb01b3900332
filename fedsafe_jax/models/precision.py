"""Precision of matrix products: an accelerator rounds float32 operands unless a product objects.

The rule of a `custom_vjp` for the backward pass is traced when the gradient is taken, after the
forward pass has left its `with`; it has to say its precision itself.
"""

import contextlib
from contextlib import AbstractContextManager

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def own_precision(dtype: DTypeLike) -> AbstractContextManager:
    """Returns a context in which products are computed in the precision of their model.

    GPUs round the operands of a product to TF32 and TPUs to bfloat16 unless it says otherwise.

    Args:
      dtype: dtype of the model's activations; products of float32 then stay float32.
    """
    if jnp.dtype(dtype) == jnp.float32:
        return jax.default_matmul_precision("float32")
    return contextlib.nullcontext()
