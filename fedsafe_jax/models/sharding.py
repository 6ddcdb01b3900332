"""Axes of the device mesh, and the table that shards base parameters over the axis `model`."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

CLIENTS, MODEL = "clients", "model"
GPU_PLATFORMS = ("gpu", "cuda", "rocm")  # names that jax gives to the devices of a GPU

# The split of Megatron-LM (arXiv 1909.08053): projections into a block are split by their outputs,
# those out of it by their inputs, so that a block needs one sum over devices. Embeddings and logits
# are split over the vocabulary.
IN, OUT = -2, -1
SPLIT_AXIS = {
    "q_proj": OUT,
    "k_proj": OUT,
    "v_proj": OUT,
    "gate_proj": OUT,
    "up_proj": OUT,
    "o_proj": IN,
    "down_proj": IN,
    "embed_tokens": IN,
    "lm_head": OUT,
}


def platform_of(mesh: Mesh | None) -> str:
    """Returns the platform of a mesh's devices, `cpu`, `gpu` or `tpu`.

    What depends on the platform asks this, not the process: a program that is compiled for a
    device which is not there takes the very path that it takes where the device is.

    Args:
      mesh: devices that compute; None for the first device of this process.
    """
    device = jax.local_devices()[0] if mesh is None else mesh.devices.flat[0]
    return "gpu" if device.platform in GPU_PLATFORMS else device.platform


def manual_axes(mesh: Mesh) -> set[str]:
    """Returns the mesh axes that a `shard_map` over clients, or over rows, takes in hand.

    All of them where no axis splits the base: a kernel for TPU must not lie under an axis that the
    compiler partitions, even one of size 1. Otherwise the axis `model` stays with the compiler,
    and attention takes it where a kernel is called (`attention_kernels`).
    """
    return {CLIENTS} if mesh.shape.get(MODEL, 1) > 1 else set(mesh.axis_names)


def leaf_spec(path: Sequence[str], shape: Sequence[int], size: int) -> PartitionSpec:
    """Returns the partition spec of one leaf of the base parameters.

    Args:
      path: keys of the leaf in the pytree, outermost first.
      shape: shape of the leaf; an axis that `size` does not divide is not split.
      size: size of the mesh axis `model`.
    """
    axis = next((SPLIT_AXIS[key] for key in path if key in SPLIT_AXIS), None)
    if axis == IN and path[-1] == "bias":
        axis = None  # It is added once, after the sum over devices.
    if axis is None or shape[axis] % size:
        return PartitionSpec()
    spec = [None] * len(shape)
    spec[axis] = MODEL
    return PartitionSpec(*spec)


def leaf_sharding(path: Sequence[str], shape: Sequence[int], mesh: Mesh | None) -> Sharding:
    """Returns the sharding of one leaf; without a mesh, the first device."""
    if mesh is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    return NamedSharding(mesh, leaf_spec(path, shape, mesh.shape.get(MODEL, 1)))


def fetch(tree: Any) -> Any:
    """Returns the arrays of a pytree as numpy arrays, whole in every process.

    Where an array lies split over several processes, all of them must call this for it.

    Args:
      tree: pytree of arrays.
    """

    def whole(x):
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return x
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.device_get(jax.tree.map(whole, tree))


def writes(tree: Any) -> bool:
    """Returns whether this process is to write files of these arrays.

    Parameters that span processes are fetched by all of them together, and the first one writes;
    parameters of one process are its own.

    Args:
      tree: pytree of arrays.
    """
    own = all(x.is_fully_addressable for x in jax.tree.leaves(tree) if isinstance(x, jax.Array))
    return own or jax.process_index() == 0


def beside(like: Any, tree: Any) -> Any:
    """Lays arrays whole on the devices that hold others, as a step of training leaves them.

    Arrays that are laid nowhere yet go where the first step computes, and come back from it with a
    place; the second step would then be compiled once more.

    Args:
      like: pytree of arrays that have a place; nothing changes where its first one has none.
      tree: pytree of arrays, in the memory of this process.
    """
    leaf = next(iter(jax.tree.leaves(like)), None)
    is_array = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
    if not is_array or not leaf.committed:
        return tree
    place = leaf.sharding
    if isinstance(place, NamedSharding):
        place = NamedSharding(place.mesh, PartitionSpec())
    return jax.device_put(tree, place)


def is_shared(mesh: Mesh | None) -> bool:
    """Returns whether the devices of a mesh are CPU cores that hold the same arrays."""
    if mesh is None or mesh.size == 1 or mesh.shape.get(MODEL, 1) > 1:
        return False
    return platform_of(mesh) == "cpu"


def one_copy(mesh: Mesh | None) -> Mesh | None:
    """Returns the devices of a mesh that hold one copy of the base, this process among their hosts.

    Work that is not split over rows runs there.

    Args:
      mesh: mesh `[clients, model]`, or None.

    Returns:
      A mesh with one entry on the axis `clients`; None where one device holds a copy.
    """
    if mesh is None or mesh.shape.get(MODEL, 1) == 1:
        return None
    own = set(jax.local_devices())
    row = next(i for i, devices in enumerate(mesh.devices) if own & set(devices))
    return Mesh(mesh.devices[row : row + 1], mesh.axis_names, axis_types=mesh.axis_types)


def share(tree: Any, mesh: Mesh) -> Any:
    """Replicates arrays over the CPU cores of a mesh (in this process) without copying them.

    All cores then read the same memory, so more of it fits into the cache that the cores share.

    Args:
      tree: pytree of arrays on the first core.
      mesh: mesh for which `is_shared` is true.
    """
    sharding = NamedSharding(mesh, PartitionSpec())

    def replicate(x):
        # A view of the first core's buffer, which the other cores alias.
        view = np.asarray(x.addressable_data(0))
        devices = sorted(sharding.addressable_devices, key=lambda d: d.id)
        parts = [jax.device_put(view, device, may_alias=True) for device in devices]
        return jax.make_array_from_single_device_arrays(x.shape, sharding, parts)

    return jax.tree.map(replicate, tree)
