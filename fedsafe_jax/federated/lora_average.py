"""Averages of LoRA factors that respect what they are: products, and of different ranks.

The mean of the factors is not the factors of the mean: mean(a_k) mean(b_k) != mean(a_k b_k).
Products are computed in float32, which accelerators do only where a product says so.
Projections are stacked as in `models.lora`, `a` `[layers, in, rank]`, `b` `[layers, rank, out]`.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedsafe_jax import random_streams
from fedsafe_jax.federated import decompositions
from fedsafe_jax.random_streams import Purpose

PROBES = 8  # columns of X in `project_products`
# Singular values below this share of the largest are rounding: float32 keeps about 1e-7 of it.
RANK_TOLERANCE = 1e-6


def _is_pair(node: Any) -> bool:
    return isinstance(node, dict) and "a" in node


def each_pair(function: Callable, *factors: Any) -> Any:
    """Applies a function to the pair `{"a", "b"}` of each projection, of one or several factors."""
    return jax.tree.map(function, *factors, is_leaf=_is_pair)


def rank_mask(factors: Any, rank: jax.Array | int) -> Any:
    """Returns float32 1 where a client of `rank` has a weight, else 0; shaped like `factors`.

    Args:
      factors: LoRA factors of the full rank.
      rank: rank of the client, an int scalar that may be traced.
    """

    def mask(pair):
        a = jnp.arange(pair["a"].shape[-1]) < rank
        return {
            "a": jnp.broadcast_to(a, pair["a"].shape).astype(jnp.float32),
            "b": jnp.broadcast_to(a[:, None], pair["b"].shape).astype(jnp.float32),
        }

    return each_pair(mask, factors)


def join(factors: Any, more: Any) -> Any:
    """Returns LoRA factors whose products are the sums of those of two, of the summed rank.

    Args:
      factors: LoRA factors.
      more: factors of any rank for the same projections; () for none.
    """
    if not jax.tree.leaves(more):
        return factors

    def one(x, y):
        return {
            key: jnp.concatenate([x[key], y[key]], axis) for key, axis in (("a", -1), ("b", -2))
        }

    return each_pair(one, factors, more)


def split(joined: Any, like: Any) -> tuple[Any, Any]:
    """Returns what `join` put together, the first of them of the rank of `like`."""

    def part(pair, first, places):
        rank = first["a"].shape[-1]
        return {"a": pair["a"][..., places(rank)], "b": pair["b"][..., places(rank), :]}

    return (
        each_pair(lambda pair, first: part(pair, first, lambda rank: slice(rank)), joined, like),
        each_pair(
            lambda pair, first: part(pair, first, lambda rank: slice(rank, None)), joined, like
        ),
    )


def fresh(factors: Any, key: jax.Array) -> Any:
    """Draws factors as at LoRA's start: `a` uniform in +-1/sqrt(in), `b` zero.

    Args:
      factors: LoRA factors, for their shapes.
      key: random key.
    """
    pairs, tree = jax.tree.flatten(factors, is_leaf=_is_pair)
    keys = [jax.random.fold_in(key, i) for i in range(len(pairs))]
    return tree.unflatten([
        {"a": _fresh_a(pair["a"], one), "b": jnp.zeros_like(pair["b"])}
        for pair, one in zip(pairs, keys, strict=True)
    ])  # fmt: skip


def _fresh_a(a: jax.Array, key: jax.Array) -> jax.Array:
    bound = 1 / math.sqrt(a.shape[-2])
    return jax.random.uniform(key, a.shape, jnp.float32, -bound, bound)


def negative(factors: Any) -> Any:
    """Returns factors of the negative products."""
    return each_pair(lambda pair: {"a": -pair["a"], "b": pair["b"]}, factors)


def stacked(client_factors: Any, weights: jax.Array) -> Any:
    """Returns factors of the weighted mean product of all clients, of rank `clients * rank`.

    Args:
      client_factors, weights: see `product_mean`.
    """

    def one(pair):
        a, b = _stacked(pair, weights)
        return {"a": a, "b": b}

    return each_pair(one, client_factors)


@jax.default_matmul_precision("float32")
def orthonormal(factors: Any, rank: int | None = None) -> Any:
    """Factors the products again, by a thin singular value decomposition; none is ever formed.

    Args:
      factors: LoRA factors.
      rank: largest rank of the result; None for that of the factors. Products of a larger rank
        are cut to the nearest of this one.

    Returns:
      `a` with orthonormal columns, also where the product has a smaller rank, and `b` with
      orthogonal rows, as long as the singular values, largest first. Slots above the sides of a
      projection are zero.
    """

    def one(pair):
        u, s, vt, q_a, q_b = _decomposed(pair["a"], pair["b"], rank or pair["a"].shape[-1])
        return {"a": q_a @ u, "b": s[..., None] * (vt @ q_b.swapaxes(-1, -2))}

    return each_pair(one, factors)


def _decomposed(a: jax.Array, b: jax.Array, rank: int) -> tuple[jax.Array, ...]:
    """Returns the leading part `(u, s, vt)` of the decomposition of `a b` in the orthonormal bases
    `(q_a, q_b)` of its sides: `a b = q_a u s vt q_b^T`, filled up with zeros to `rank`."""
    # The product itself is never formed: it may be a hundred times the factors.
    q_a, r_a = decompositions.qr(a)
    q_b, r_b = decompositions.qr(b.swapaxes(-1, -2))
    u, s, vt = decompositions.svd(r_a @ r_b.swapaxes(-1, -2))
    # A rank above the sides of a projection has more slots than there are singular values.
    missing = max(rank - s.shape[-1], 0)
    u, s, vt = (
        jnp.pad(x[place], [*[(0, 0)] * (x.ndim - len(pad)), *pad])
        for x, place, pad in (
            (u, (..., slice(rank)), [(0, 0), (0, missing)]),
            (s, (..., slice(rank)), [(0, missing)]),
            (vt, (..., slice(rank), slice(None)), [(0, missing), (0, 0)]),
        )
    )
    return u, s, vt, q_a, q_b


def _stacked(pair: dict, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns factors of the weighted mean product, `[layers, in, clients * rank]` and
    `[layers, clients * rank, out]`."""
    share = weights / jnp.maximum(jnp.sum(weights), 1e-12)
    a = jnp.moveaxis(pair["a"] * share[:, None, None, None], 0, -2)  # [layers, in, clients, rank]
    b = jnp.moveaxis(pair["b"], 0, 1)  # [layers, clients, rank, out]
    return a.reshape(*a.shape[:-2], -1), b.reshape(b.shape[0], -1, b.shape[-1])


@jax.default_matmul_precision("float32")
def product_mean(client_factors: Any, weights: jax.Array, key: jax.Array) -> Any:
    """Averages the products a_k b_k, and factors the mean again, to the rank of the clients.

    This is FlexLoRA (Bai et al., 2024, arXiv 2402.11505). The factors are in a basis of their own:
    only their product may be compared with the present ones. No change of basis could mend that
    without losing the order of the slots, nor at all while `b` is zero, so server steps other than
    the mean itself are refused (`Algorithm.keeps_mean`).

    Args:
      client_factors: leaves `[clients, layers, ...]`; smaller ranks are filled up with zeros.
      weights: float32 `[clients]`.
      key: random key of the slots that the mean leaves empty.

    Returns:
      The closest factors of the same rank, by the singular value decomposition of the mean; the
      leading slots matter most, so that a smaller rank is a prefix. Where the mean has a smaller
      rank, the slots left over begin anew as in `lora.init`, `a` uniform in +-1/sqrt(in) and `b`
      zero: with zeros in both they would have no gradient, and never learn again.
    """

    def one(pair, key):
        rank = pair["a"].shape[-1]
        a, b = _stacked(pair, weights)
        u, s, vt, q_a, q_b = _decomposed(a, b, rank)
        empty = s <= RANK_TOLERANCE * s[..., :1]
        root = jnp.sqrt(jnp.where(empty, 0.0, s))
        a = (q_a @ u) * root[..., None, :]
        return {
            "a": jnp.where(empty[..., None, :], _fresh_a(a, key), a),
            "b": root[..., None] * (vt @ q_b.swapaxes(-1, -2)),
        }

    pairs, tree = jax.tree.flatten(client_factors, is_leaf=_is_pair)
    return tree.unflatten([one(pair, jax.random.fold_in(key, i)) for i, pair in enumerate(pairs)])


@jax.default_matmul_precision("float32")
def product_norm(factors: Any) -> jax.Array:
    """Returns the Frobenius norm of the products of LoRA factors, all together, float32 `[]`."""

    def square(pair):
        a, b = pair["a"], pair["b"]
        return jnp.sum((a.swapaxes(-1, -2) @ a) * (b @ b.swapaxes(-1, -2)))

    return jnp.sqrt(jnp.maximum(sum(jax.tree.leaves(each_pair(square, factors))), 0.0))


@jax.default_matmul_precision("float32")
def project_products(factors: Any) -> jax.Array:
    """Returns random projections `X^T a b` of the products of LoRA factors, float32, flat.

    Projections are linear in the products: the mean of the clients' projections is the projection
    of their mean product, which is too large to send. Lengths are kept within about
    `1 / sqrt(2 * PROBES * layers * projections)`, 9% for two projections in four layers
    (Hutchinson, 1989).
    """
    pairs, _ = jax.tree.flatten(factors, is_leaf=_is_pair)
    projections = []
    for i, pair in enumerate(pairs):
        key = random_streams.key(Purpose.PRODUCTS, 0, i)
        x = jax.random.rademacher(key, (*pair["a"].shape[:-1], PROBES), jnp.float32)
        projections.append((x.swapaxes(-1, -2) @ pair["a"] @ pair["b"]).ravel())
    return jnp.concatenate(projections)


@jax.default_matmul_precision("float32")
def projected_gap(mean_projection: jax.Array, mean: Any) -> jax.Array:
    """Estimates `product_gap`, float32 `[]`.

    Args:
      mean_projection: mean of the clients' `project_products`.
      mean: LoRA factors, such as the mean of the clients' factors.
    """
    difference = jnp.linalg.norm(project_products(mean) - mean_projection)
    return difference / jnp.maximum(jnp.linalg.norm(mean_projection), 1e-15)


@jax.default_matmul_precision("float32")
def product_gap(client_factors: Any, weights: jax.Array, mean: Any) -> jax.Array:
    """Returns how far the product of LoRA factors is from the mean of the clients' products.

    Args:
      client_factors, weights: see `product_mean`.
      mean: LoRA factors, such as the mean of the clients' factors.

    Returns:
      Frobenius norm of the difference over that of the mean product, all projections together,
      float32 `[]`.
    """

    def squares(pair, average):
        a, b = _stacked(pair, weights)
        if a.shape[-1] > min(a.shape[-2], b.shape[-1]):  # With many clients the mean is smaller.
            mean_product = a @ b
            difference = average["a"] @ average["b"] - mean_product
            return jnp.sum(jnp.square(difference)), jnp.sum(jnp.square(mean_product))

        def norm(a, b):  # |a b|^2, by the Gram matrices of the small side.
            return jnp.sum((a.swapaxes(-1, -2) @ a) * (b @ b.swapaxes(-1, -2)))

        a_diff = jnp.concatenate([average["a"], -a], axis=-1)
        b_diff = jnp.concatenate([average["b"], b], axis=-2)
        return norm(a_diff, b_diff), norm(a, b)

    pairs = jax.tree.leaves(each_pair(squares, client_factors, mean))
    differences, means = pairs[::2], pairs[1::2]
    return jnp.sqrt(jnp.maximum(sum(differences), 0.0) / jnp.maximum(sum(means), 1e-30))
