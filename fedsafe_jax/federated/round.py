"""One federated round as one jitted program: map clients, train locally, aggregate."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from fedsafe_jax.data.packing import Batch
from fedsafe_jax.federated.aggregation import global_norm
from fedsafe_jax.federated.algorithms import FederatedAlgorithm, ServerState
from fedsafe_jax.models.sharding import CLIENTS


class RoundMetrics(NamedTuple):
    """What a round reports."""

    losses: jax.Array  # float32 [clients, steps], nats a learned token
    delta_norms: jax.Array  # float32 [clients]
    update_norm: jax.Array  # float32 scalar, of the server's step


def make_round(algorithm: FederatedAlgorithm, mesh: Mesh, clients_in_parallel: int):
    """Builds the jitted round.

    Args:
      algorithm: FedAvg, SCAFFOLD, ...
      mesh: devices along `clients`, which split the cohort, and `model`, which split the base.
      clients_in_parallel: clients that each device vmaps at once; it takes the rest in turn.

    Returns:
      `(server_state, base, batches, client_ids, weights, rate) -> (server_state, RoundMetrics)`.
      Leaves of `batches` are `[clients, steps, rows, seq]`, `client_ids` int32 `[clients]`,
      `weights` float32 `[clients]`; the cohort is a multiple of that axis (see `pad_cohort`). The
      old state is donated.
    """

    def train_clients(server, client_states, base, batches, rate):
        def one_client(inputs):
            client_state, client_batches = inputs
            return algorithm.client_update(server, client_state, base, client_batches, rate)

        return jax.lax.map(one_client, (client_states, batches), batch_size=clients_in_parallel)

    def round_fn(server: ServerState, base, batches: Batch, client_ids, weights, rate):
        cohort_states = jax.tree.map(lambda s: s[client_ids], server.client_states)
        shared = server._replace(client_states=())
        if mesh.shape[CLIENTS] > 1:
            split, whole = PartitionSpec(CLIENTS), PartitionSpec()
            # check_vma=False: with it on, `grad` of the device-invariant adapter would sum
            # gradients over devices inside every local step. `pcast` to varying avoids that too,
            # but fails in the backward pass of the loss's checkpointed `cond` (jax 0.10.2).
            mapped = jax.shard_map(
                train_clients,
                mesh=mesh,
                axis_names={CLIENTS},  # `model` stays automatic
                check_vma=False,
                in_specs=(whole, split, whole, split, whole),
                out_specs=(split, split, split),
            )
        else:
            mapped = train_clients
        updates, states, losses = mapped(shared, cohort_states, base, batches, rate)
        new = algorithm.server_update(server, updates, weights)
        # Padding clients carry an id past the end: their state is dropped. A client without
        # examples keeps the state it had.
        present = weights > 0
        num = jax.tree.leaves(server.client_states)[0].shape[0] if server.client_states else 0
        where = jnp.where(present, client_ids, num)
        new = new._replace(
            client_states=jax.tree.map(
                lambda old, s: old.at[where].set(s, mode="drop"), server.client_states, states
            )
        )
        step = jax.tree.map(jnp.subtract, new.adapter, server.adapter)
        metrics = RoundMetrics(losses, jax.vmap(global_norm)(updates.adapter), global_norm(step))
        return new, metrics

    return jax.jit(round_fn, donate_argnums=0)


def pad_cohort(batches: Batch, client_ids: np.ndarray, weights: np.ndarray, multiple: int):
    """Adds clients of weight zero until the cohort is a multiple of the mesh axis `clients`."""
    missing = -len(client_ids) % multiple
    if not missing:
        return batches, client_ids, weights
    padded = Batch(
        *(np.concatenate([f, np.zeros((missing, *f.shape[1:]), f.dtype)]) for f in batches)
    )
    ids = np.concatenate([client_ids, np.zeros(missing, client_ids.dtype)])
    return padded, ids, np.concatenate([weights, np.zeros(missing, weights.dtype)])
