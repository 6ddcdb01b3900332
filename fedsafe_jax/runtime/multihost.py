"""Runs of several processes: hosts of a TPU pod, tasks of SLURM, or a laptop's cores.

All processes run the same program. Federated training is split over all devices; generation, CAI
and evaluation are computed by every process on its own devices, from the same seeds. Where a copy
of the base lies on several hosts, no process has one to itself: all then generate, train and
evaluate together on the whole mesh. The primary process decides whatever could differ between
hosts, and it alone writes records and reports.
"""

import itertools
import os
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from fedsafe_jax.federated.mesh import spans_hosts
from fedsafe_jax.runtime import cluster
from fedsafe_jax.runtime.cluster import ClusterError
from fedsafe_jax.whole_files import StorageError, WorkdirError

Result = TypeVar("Result")

LOST_AFTER_S = 100  # without heartbeats a process counts as dead, and jax ends the others
BARRIER_TIMEOUT_S = 4 * 3600  # how long a process waits for one that lives and does not come
COMMAND_TIMEOUT_S = 24 * 3600  # the same, for a whole command that the first one does alone
BROADCAST_BYTES = 256 << 20  # sent at once
_barriers = itertools.count()


class AbsentError(StorageError):
    """Another process of the run has not come in time; the same command may go on later."""


def join() -> None:
    """Connects to the other processes, if there are any; before jax computes anything.

    Raises:
      ClusterError: the environment describes a cluster that cannot be joined, or the devices are
        part of a slice of several hosts, which was not joined.
    """
    arguments = cluster.arguments(os.environ, cluster.on_tpu_vm())
    if arguments is not None:
        try:
            jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=LOST_AFTER_S)
        except ValueError as error:  # what jax says of settings; lost connections are no ValueError
            raise ClusterError(
                f"the other processes are not found ({error}); set JAX_COORDINATOR_ADDRESS, "
                "JAX_NUM_PROCESSES and JAX_PROCESS_ID in each process."
            ) from error
    check_joined()


def check_joined() -> None:
    """Checks that this process is connected where there are others.

    Raises:
      ClusterError: it is not. A TPU of a slice knows its other hosts, but programs on them cannot
        be started together.
    """
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise ClusterError(
            f"the slice has {jax.process_count()} hosts, and this process has not joined the "
            f"others: start the same command on every host with {cluster.SWITCH}=on, or call "
            "jax.distributed.initialize() before any computation."
        )


def is_primary() -> bool:
    """Whether this is the primary process, the one that writes."""
    return jax.process_index() == 0


def barrier(name: str, timeout_s: float | None = None) -> None:
    """Blocks until every process reaches this barrier.

    A collective over devices times out after half a minute on CPU, less than the time by which
    processes may differ after work that each does alone. Hence a barrier comes before collectives.
    A process that died is noticed by its missing heartbeats: jax then aborts the others, within
    two minutes and with its own message.

    Args:
      name: name of the barrier, the same in all processes.
      timeout_s: how long to wait; None for `BARRIER_TIMEOUT_S`.

    Raises:
      AbsentError: a process has not come in this time.
    """
    if jax.process_count() > 1:
        check_joined()
        import orbax.checkpoint as ocp  # a second to import, which few runs need

        wait = ocp.multihost.get_barrier_sync_fn()
        timeout_s = timeout_s or BARRIER_TIMEOUT_S
        try:
            wait(key=f"{name}_{next(_barriers)}", timeout_ms=int(timeout_s * 1000))
        except jax.errors.JaxRuntimeError as error:
            reason = " ".join(str(error).split())
            raise AbsentError(
                f"process {jax.process_index()} waited at '{name}' for processes that did not come "
                f"within {timeout_s:.0f} s, or have ended: {reason:.300}. Start the same command "
                "again on every host."
            ) from error


def on_first(work: Callable[[], None], name: str) -> None:
    """Runs what needs the devices of one host alone, in the primary process; the others wait.

    The hosts of a TPU slice start together or not at all, also for a command that one of them does.

    Args:
      work: the work; it uses `jax.local_devices()`.
      name: name of the barrier behind it.
    """
    join()
    if is_primary():
        work()
    barrier(name, COMMAND_TIMEOUT_S)


def first(work: Callable[[], Result]) -> Result | None:
    """Runs work in the primary process; where it fails, no process goes on, and none waits.

    Args:
      work: what may raise an exception, such as a `WorkdirError`.

    Returns:
      What `work` returned; None in other processes than the first.

    Raises:
      StorageError, WorkdirError: in the others, where `work` failed; the first one if the same
        command may go on later, as launch scripts must learn on every host.
    """
    result, failure = None, None
    if is_primary():
        try:
            result = work()
        except Exception as error:
            failure = error
    kind = 0 if failure is None else 1 if isinstance(failure, StorageError) else 2
    kind = int(broadcast(np.int64(kind)))
    if kind:
        other = StorageError if kind == 1 else WorkdirError
        raise failure or other("the first process has stopped; it says why.")
    return result


def broadcast_bool(value: bool) -> bool:
    """Returns the primary process's value in all processes.

    For answers of the file system, which processes on different hosts may see at different times.
    """
    if jax.process_count() == 1:
        return value
    barrier("broadcast_bool")
    return bool(multihost_utils.broadcast_one_to_all(np.int32(value)))


def broadcast(tree: Any) -> Any:
    """Returns the primary process's arrays in all processes, to the bit.

    Args:
      tree: pytree of arrays, of the same shapes and dtypes in all processes.
    """
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(_broadcast_one, tree)


def _broadcast_one(x: Any) -> np.ndarray:
    """Returns the primary process's array, in pieces that fit beside a model on a device."""
    x = np.asarray(x)
    if not x.size:
        return x
    sent = np.frombuffer(x.tobytes(), np.uint8)  # jax would make 32 bits of 64
    received = []
    for start in range(0, len(sent), BROADCAST_BYTES):
        barrier("broadcast")
        piece = sent[start : start + BROADCAST_BYTES]
        received.append(np.asarray(multihost_utils.broadcast_one_to_all(piece)))
    # A bytearray, so that the array can be written to.
    return np.frombuffer(bytearray(b"".join(received)), x.dtype).reshape(x.shape)


def local_mesh(mesh: Mesh) -> Mesh:
    """Returns the part of a mesh with which this process generates and evaluates.

    These are its own devices; where a copy of the base lies on several hosts, all devices: every
    process then runs the same programs on the whole mesh.
    """
    return mesh if jax.process_count() == 1 or spans_hosts(mesh) else mesh.local_mesh


def local(tree: Any, mesh: Mesh) -> Any:
    """Returns arrays on a mesh of all processes as arrays on `local_mesh`, without moving them.

    Args:
      tree: pytree of arrays that every process holds whole, or split over its own devices along
        the axis `model`.
      mesh: mesh of all processes' devices.
    """
    own = local_mesh(mesh)
    if own is mesh:
        return tree

    def addressable(x):
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return x
        parts = [shard.data for shard in x.addressable_shards]
        sharding = NamedSharding(own, x.sharding.spec)
        return jax.make_array_from_single_device_arrays(x.shape, sharding, parts)

    return jax.tree.map(addressable, tree)
