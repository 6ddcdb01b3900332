"""Averages of adapters that respect what they are: products, and of different ranks.

The mean of the factors is not the factors of the mean: mean(a_k) mean(b_k) != mean(a_k b_k).
Projections are stacked as in `models.lora`, `a` `[layers, in, rank]`, `b` `[layers, rank, out]`.
"""

import jax
import jax.numpy as jnp

PROBES = 8  # columns of X in `project_products`


def _is_pair(node) -> bool:
    return isinstance(node, dict) and "a" in node


def _map(function, *adapters):
    return jax.tree.map(function, *adapters, is_leaf=_is_pair)


def rank_mask(adapter, rank):
    """1 where a client of `rank` (int scalar, may be traced) has a weight; like `adapter`."""

    def mask(pair):
        a = jnp.arange(pair["a"].shape[-1]) < rank
        return {
            "a": jnp.broadcast_to(a, pair["a"].shape).astype(jnp.float32),
            "b": jnp.broadcast_to(a[:, None], pair["b"].shape).astype(jnp.float32),
        }

    return _map(mask, adapter)


def _stacked(pair, weights):
    """Factors of the weighted mean product, of rank `clients * rank`."""
    share = weights / jnp.maximum(jnp.sum(weights), 1e-12)
    a = jnp.moveaxis(pair["a"] * share[:, None, None, None], 0, -2)  # [layers, in, clients, rank]
    b = jnp.moveaxis(pair["b"], 0, 1)  # [layers, clients, rank, out]
    return a.reshape(*a.shape[:-2], -1), b.reshape(b.shape[0], -1, b.shape[-1])


def product_mean(adapters, weights: jax.Array):
    """The mean of the products a_k b_k, refactored to their rank (FlexLoRA, Bai et al., 2024).

    Args:
      adapters: leaves `[clients, layers, ...]`; smaller ranks are filled up with zeros.
      weights: float32 `[clients]`.

    Returns:
      The closest adapter of the same rank, by the singular value decomposition of the mean; the
      leading slots matter most, so that a smaller rank is a prefix.
    """

    def one(pair):
        rank = pair["a"].shape[-1]
        a, b = _stacked(pair, weights)
        # The mean itself is never formed: it may be a hundred times the factors.
        q_a, r_a = jnp.linalg.qr(a)
        q_b, r_b = jnp.linalg.qr(b.swapaxes(-1, -2))
        u, s, vt = jnp.linalg.svd(r_a @ r_b.swapaxes(-1, -2), full_matrices=False)
        root = jnp.sqrt(s[..., :rank])
        return {
            "a": (q_a @ u[..., :rank]) * root[..., None, :],
            "b": root[..., None] * (vt[..., :rank, :] @ q_b.swapaxes(-1, -2)),
        }

    return _map(one, adapters)


def project_products(adapter) -> jax.Array:
    """Random projections `X^T a b` of an adapter's products, float32, flat.

    They are linear in the products: the mean of the clients' projections is the projection of their
    mean product, which is too large to send. Lengths are kept within about `1 / sqrt(2 * PROBES *
    layers * projections)`, 9% for two projections in four layers (Hutchinson, 1989).
    """
    pairs, _ = jax.tree.flatten(adapter, is_leaf=_is_pair)
    found = []
    for i, pair in enumerate(pairs):
        key = jax.random.fold_in(jax.random.key(0), i)
        x = jax.random.rademacher(key, (*pair["a"].shape[:-1], PROBES), jnp.float32)
        found.append((x.swapaxes(-1, -2) @ pair["a"] @ pair["b"]).ravel())
    return jnp.concatenate(found)


def projected_gap(mean_projection: jax.Array, mean) -> jax.Array:
    """`product_gap` from the mean of the clients' `project_products` and an adapter."""
    difference = jnp.linalg.norm(project_products(mean) - mean_projection)
    return difference / jnp.maximum(jnp.linalg.norm(mean_projection), 1e-15)


def product_gap(adapters, weights: jax.Array, mean) -> jax.Array:
    """How far an adapter's product is from the mean of the clients' products.

    Args:
      adapters, weights: see `product_mean`.
      mean: an adapter, such as the mean of the factors.

    Returns:
      Frobenius norm of the difference over that of the mean product, all projections together.
    """

    def squares(pair, average):
        a, b = _stacked(pair, weights)
        if a.shape[-1] > min(a.shape[-2], b.shape[-1]):  # many clients: the mean itself is smaller
            mean_product = a @ b
            difference = average["a"] @ average["b"] - mean_product
            return jnp.sum(jnp.square(difference)), jnp.sum(jnp.square(mean_product))

        def norm(a, b):  # |a b|^2 by Gram matrices of the small side
            return jnp.sum((a.swapaxes(-1, -2) @ a) * (b @ b.swapaxes(-1, -2)))

        a_diff = jnp.concatenate([average["a"], -a], axis=-1)
        b_diff = jnp.concatenate([average["b"], b], axis=-2)
        return norm(a_diff, b_diff), norm(a, b)

    found = jax.tree.leaves(_map(squares, adapters, mean))
    return jnp.sqrt(jnp.maximum(sum(found[::2]), 0.0) / jnp.maximum(sum(found[1::2]), 1e-30))
