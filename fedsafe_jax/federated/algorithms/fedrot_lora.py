"""FedRot-LoRA: clients turn the basis of their factors to that of the global ones before the mean.

"FedRot-LoRA" (2026, arXiv 2602.23638). A rotation `R` of the slots leaves a client's model as it
is, `(a R) (R^T b) = a b`, but the mean of factors is nearer to the mean of products where clients
have the same basis. Rounds align `a` and `b` in turn, to those that the round began with.
"""

import jax
import jax.numpy as jnp

from fedsafe_jax.federated import decompositions, lora_average
from fedsafe_jax.federated.algorithms.base import (
    Algorithm,
    ClientUpdate,
    FederatedAlgorithm,
    Hyperparameters,
    ServerState,
    counted_step,
)
from fedsafe_jax.federated.client import LocalTraining, local_training


def nearest_rotation(matrix: jax.Array) -> jax.Array:
    """Returns the rotations `R` `[..., r, r]`, of determinant 1, with the largest trace of `M^T R`.

    This is the orthogonal Procrustes problem (Kabsch, 1976): `U diag(1, .., det(U V^T)) V^T` of the
    decomposition `M = U S V^T`.

    Args:
      matrix: float32 `[..., r, r]`, M.
    """
    u, _, vt = decompositions.svd(matrix)
    sign = jnp.sign(decompositions.det(u @ vt))
    last = jnp.where(jnp.arange(u.shape[-1]) == u.shape[-1] - 1, sign[..., None], 1.0)
    return (u * last[..., None, :]) @ vt


@jax.default_matmul_precision("float32")
def align(pair: dict, reference: dict, by_a: jax.Array | bool, strength: float) -> dict:
    """Turns a client's factors towards a reference; their product stays the same.

    Args:
      pair: factors `a` `[..., in, rank]` and `b` `[..., rank, out]` of the client.
      reference: factors of the same shapes.
      by_a: whether `a`, instead of `b`, is brought to the reference's; it may be traced.
      strength: lambda, from 0 (no rotation) to 1 (the nearest one).
    """
    by_factor = (
        pair["a"].swapaxes(-1, -2) @ reference["a"],
        pair["b"] @ reference["b"].swapaxes(-1, -2),
    )
    best = nearest_rotation(jnp.where(by_a, *by_factor))
    identity = jnp.eye(best.shape[-1], dtype=best.dtype)
    rotation = nearest_rotation((1 - strength) * identity + strength * best)
    return {"a": pair["a"] @ rotation, "b": rotation.swapaxes(-1, -2) @ pair["b"]}


def make(
    training: LocalTraining, num_clients: int, hyperparameters: Hyperparameters
) -> FederatedAlgorithm:
    """Returns FedAvg of aligned factors; the first round, in which `b` was zero, aligns nothing."""
    del num_clients
    h = hyperparameters

    def init(factors):
        return ServerState(factors, (), jnp.zeros((), jnp.int32))

    def client_update(server, client_state, start, base, batches, steps):
        done = server.optimizer
        result = local_training(training, start, base, batches=batches, steps=steps)
        turned = lora_average.each_pair(
            lambda pair, reference: align(pair, reference, done % 2 == 1, h.rotation),
            result.factors,
            start,
        )
        delta = jax.tree.map(
            lambda new, old, x: jnp.where(done > 0, new, old) - x, turned, result.factors, start
        )
        return ClientUpdate(delta, ()), client_state, result

    def server_update(server, delta, control):
        del control
        return counted_step(server, delta, h.server_learning_rate)

    return FederatedAlgorithm(init, lambda factors: (), client_update, server_update=server_update)


FEDROT_LORA = Algorithm(
    make,
    sites=False,  # a site does not know how many of the rounds counted
    refuses={
        "federated.client_ranks": "a rotation of all slots mixes those that a client lacks into "
        "those it has"
    },
)
