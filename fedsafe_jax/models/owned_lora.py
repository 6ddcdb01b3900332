"""Several adapters over one base in one batch: each token goes through its owner's factors alone.

The base is read once for all rows. The factors of all adapters lie in one array a projection; a
token's products with those of others are set to zero between `a` and `b`, so that nothing is
gathered, and no row needs a copy of its adapter.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

NOBODY = -1  # owner of the tokens of the base itself


class Owned(NamedTuple):
    """Factors of several adapters, and who owns the tokens.

    Attributes:
      factors: of each adapted projection `a` `[layers, adapters, in, rank]` and `b` `[layers,
        adapters, rank, out]`, see `adapter_stack.stack`.
      owner: int32 `[rows, seq]`, the adapter of each token, `NOBODY` for the base.
    """

    factors: dict
    owner: jax.Array | np.ndarray


def for_layers(owned: Owned) -> dict:
    """Returns factors as `decoder_layer.Projection` takes them, the owner beside each pair."""

    def beside(pair: dict) -> dict:
        layers = pair["a"].shape[0]
        return pair | {"owner": jnp.broadcast_to(owned.owner, (layers, *owned.owner.shape))}

    blocks = owned.factors["layers"].items()
    return {
        "layers": {
            block: {name: beside(pair) for name, pair in projections.items()}
            for block, projections in blocks
        }
    }


def product(x: jax.Array, a: jax.Array, b: jax.Array, owner: jax.Array) -> jax.Array:
    """Returns `x @ a @ b` of each token's owner, `[rows, seq, out]`; zeros for `NOBODY`.

    Args:
      x: `[rows, seq, in]`.
      a, b: `[adapters, in, rank]` and `[adapters, rank, out]`.
      owner: int32 `[rows, seq]`.
    """
    inner = jnp.einsum("...si,air->...sar", x, a)
    own = owner[..., None] == jnp.arange(a.shape[0])
    return jnp.einsum("...sar,aro->...so", jnp.where(own[..., None], inner, 0), b)
