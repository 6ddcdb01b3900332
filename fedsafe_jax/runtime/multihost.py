"""Several processes that make one run: hosts of a TPU pod, tasks of SLURM, or a laptop's cores.

All processes run the same program. Federated training is split over all devices; generation, CAI
and evaluation are computed by every process on its own devices, from the same seeds. What could
differ between hosts is decided by the first process, which alone writes records and reports.
"""

import itertools
import os
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

BARRIER_TIMEOUT_S = 24 * 3600  # with processes that are behind
_barriers = itertools.count()


class ClusterError(RuntimeError):
    """The environment describes a cluster that cannot be joined."""


def cluster_args(environment: Mapping[str, str]) -> dict | None:
    """Arguments of `jax.distributed.initialize`, or None where there is one process.

    Read are JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID; tasks of srun
    (SLURM) and mpirun (Open MPI), and hosts of a TPU slice or multislice, which jax finds itself.

    Raises:
      ClusterError: the variables are incomplete, or no numbers.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = [name for name in names if environment.get(name)]
    if given and len(given) < len(names):
        missing = ", ".join(name for name in names if name not in given)
        raise ClusterError(f"{', '.join(given)} set, but not {missing}; set all or none.")
    if given:
        try:
            count, own = (int(environment[name]) for name in names[1:])
        except ValueError:
            found = ", ".join(f"{name}={environment[name]}" for name in names[1:])
            raise ClusterError(f"{found}: expected two numbers.") from None
        if not 0 <= own < count:
            raise ClusterError(
                f"JAX_PROCESS_ID={own}: expected less than JAX_NUM_PROCESSES={count}."
            )
        return {
            "coordinator_address": environment[names[0]],
            "num_processes": count,
            "process_id": own,
        }
    tasks = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES")
    several = any(int(environment.get(name) or 1) > 1 for name in tasks)
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "")
    return {} if several or "," in hosts else None


def join() -> None:
    """Joins the other processes, if there are any, before jax computes anything."""
    arguments = cluster_args(os.environ)
    if arguments is not None:
        jax.distributed.initialize(**arguments)


def is_primary() -> bool:
    """Whether this process writes."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when every process has come here.

    A collective of devices gives up after half a minute on CPU, and work that each process does by
    itself may differ by more; a process that died is noticed by its missing heartbeats.
    """
    if jax.process_count() > 1:
        import orbax.checkpoint as ocp  # a second to import, which few runs need

        barrier = ocp.multihost.get_barrier_sync_fn()
        barrier(key=f"{name}_{next(_barriers)}", timeout_ms=BARRIER_TIMEOUT_S * 1000)


def broadcast_bool(value: bool) -> bool:
    """The first process's value, in all: files may not be seen by every process at once."""
    if jax.process_count() == 1:
        return value
    barrier("agreed")
    return bool(multihost_utils.broadcast_one_to_all(np.int32(value)))


def broadcast(tree):
    """The first process's arrays, in all."""
    if jax.process_count() == 1:
        return tree
    barrier("same")
    return multihost_utils.broadcast_one_to_all(jax.tree.map(np.asarray, tree))


def local_mesh(mesh: Mesh) -> Mesh:
    """The part of a mesh that this process holds."""
    return mesh if jax.process_count() == 1 else mesh.local_mesh


def local(tree, mesh: Mesh):
    """This process's copies of arrays that lie on a mesh of all, without moving them.

    Args:
      tree: arrays that are whole, or split over the axis `model`, within every process.
      mesh: of all processes.
    """
    if jax.process_count() == 1:
        return tree
    own = mesh.local_mesh

    def one(x):
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return x
        parts = [shard.data for shard in x.addressable_shards]
        sharding = NamedSharding(own, x.sharding.spec)
        return jax.make_array_from_single_device_arrays(x.shape, sharding, parts)

    return jax.tree.map(one, tree)
