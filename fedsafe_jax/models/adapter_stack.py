"""Adapters of one base as one set of factors, for batches in which each token has its own."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from fedsafe_jax.models.lora import BLOCK_OF, Adapter


def stack(adapters: Sequence[Adapter]) -> tuple[dict, float]:
    """Returns the factors of adapters as `owned_lora.Owned` holds them, and their common scale.

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
