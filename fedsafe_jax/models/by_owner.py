"""A product of rows with the matrix of each row's owner: adapters of many clients in one batch.

`vmap` over clients wants as many rows of each. Here rows come in any order and number, each with
the index of the client whose factor it takes, so that no row is padding for another client's sake.

The gradient of the factors is summed in float32, whatever the rows are in: where the gather is
differentiated by jax, the rows' gradients are added in the type of the gathered factors, and in
bfloat16 a sum of 16 rows is off by 0.5% (a relative error of 5e-3; 1e-7 here). Rows are added up
by a product with a matrix of zeros and ones, as accelerators scatter slowly. A ragged product
(`jax.lax.ragged_dot`) computes the same, and compiles to one dense product a client (jax 0.10).
"""

import jax
import jax.numpy as jnp

from fedsafe_jax.models.precision import own_precision


@jax.custom_vjp
def by_owner(x: jax.Array, factors: jax.Array, owner: jax.Array) -> jax.Array:
    """Returns the product of each row with its owner's factor.

    Args:
      x: `[rows, seq, in]`.
      factors: float32 `[clients, in, out]`, rounded to the dtype of `x`.
      owner: int32 `[rows]`, below `clients`.

    Returns:
      `[rows, seq, out]` in the dtype of `x`. Its gradient with respect to `factors` is float32, and
      exactly zero for a client without rows.
    """
    with own_precision(x.dtype):
        return jnp.einsum("rsi,rio->rso", x, _of_rows(x, factors, owner))


def _of_rows(x, factors, owner):
    return factors.astype(x.dtype)[owner]


def _forward(x, factors, owner):
    return by_owner(x, factors, owner), (x, factors, owner)


def _backward(kept, gradient):
    x, factors, owner = kept
    with own_precision(x.dtype):
        # Gathered again, as `[rows, in, out]` would be kept for every projection of every layer.
        to_x = jnp.einsum("rso,rio->rsi", gradient, _of_rows(x, factors, owner))
        of_row = jnp.einsum("rsi,rso->rio", x, gradient, preferred_element_type=jnp.float32)
    to_factors = sum_by_owner(of_row.reshape(len(of_row), -1), owner, len(factors))
    return to_x, to_factors.reshape(factors.shape), None


by_owner.defvjp(_forward, _backward)


def sum_by_owner(values: jax.Array, owner: jax.Array, clients: int) -> jax.Array:
    """Returns the sums of the rows of each client, float32 `[clients, ...]`.

    Args:
      values: float32 `[rows]` or `[rows, numbers]`.
      owner: int32 `[rows]`, below `clients`.
      clients: number of clients.
    """
    is_owner = (owner == jnp.arange(clients)[:, None]).astype(jnp.float32)
    return jnp.dot(is_owner, values, precision="highest")


def sum_of_owners(
    values: jax.Array, mask: jax.Array, owner: jax.Array, targets: jax.Array
) -> jax.Array:
    """Returns what rows of many clients add to the `loss.masked_mean` of each, float32 `[clients]`.

    Args:
      values, mask: float32 `[rows, seq]`, as for `loss.masked_mean`.
      owner: int32 `[rows]`, the client of each row.
      targets: float32 `[clients]`, target tokens of a client in all of its rows, here or not.
    """
    of_row = jnp.sum(values * mask, 1) / jnp.maximum(targets, 1)[owner]
    return sum_by_owner(of_row, owner, len(targets))


def by_layer(factors: dict) -> dict:
    """Returns LoRA factors `[layers, clients, ...]` of those `[clients, layers, ...]`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1), factors)
