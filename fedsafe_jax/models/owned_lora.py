"""Several adapters over one base in one batch: each token goes through its owner's factors alone.

The base is read once for all rows. The factors of all adapters lie in one array a projection; a
token's products with those of others are set to zero between `a` and `b`, so that nothing is
gathered, and no row needs a copy of its adapter.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedsafe_jax.models.lora import BLOCK_OF, Adapter

NOBODY = -1  # owner of the tokens of the base itself


class Owned(NamedTuple):
    """Factors of several adapters, and who owns the tokens.

    Attributes:
      factors: of each adapted projection `a` `[layers, adapters, in, rank]` and `b` `[layers,
        adapters, rank, out]`, see `stack`.
      owner: int32 `[rows, seq]`, the adapter of each token, `NOBODY` for the base.
    """

    factors: dict
    owner: jax.Array | np.ndarray


def stack(adapters: Sequence[Adapter]) -> tuple[dict, float]:
    """Returns the factors of adapters as `Owned` holds them, and their common scale.

    Ranks are filled up with zeros, and so are projections that only some adapt; another scale than
    the first adapter's is multiplied into `b`.

    Args:
      adapters: at least one, all of one base.
    """
    scale = adapters[0].config.scale
    names = [n for n in BLOCK_OF if any(n in one.config.targets for one in adapters)]
    rank = max(one.config.rank for one in adapters)
    factors: dict = {"layers": {}}
    for name in names:
        pairs = [one.factors["layers"].get(BLOCK_OF[name], {}).get(name) for one in adapters]
        known = next(pair for pair in pairs if pair is not None)
        blank = {key: jnp.zeros_like(leaf) for key, leaf in known.items()}
        a, b = [], []
        for one, pair in zip(adapters, pairs, strict=True):
            pair = pair or blank
            more = rank - pair["a"].shape[-1]
            a.append(jnp.pad(pair["a"], ((0, 0), (0, 0), (0, more))))
            b.append(jnp.pad(pair["b"], ((0, 0), (0, more), (0, 0))) * (one.config.scale / scale))
        both = {"a": jnp.stack(a, axis=1), "b": jnp.stack(b, axis=1)}
        factors["layers"].setdefault(BLOCK_OF[name], {})[name] = both
    return factors, scale


def is_finite(adapter: Adapter) -> bool:
    """Returns whether all factors are numbers: others would spoil their neighbours' rows."""
    return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(adapter.factors))


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
