"""Axes of the device mesh, and the one table from a base parameter to the axis `model`."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

CLIENTS, MODEL = "clients", "model"

# Megatron's split (Shoeybi et al., 2019): outputs of what widens, inputs of what narrows, so that a
# block needs one sum over devices. Embeddings and logits are split over the vocabulary.
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


def leaf_spec(path: Sequence[str], shape: Sequence[int], size: int) -> PartitionSpec:
    """The axes of one leaf.

    Args:
      path: keys of the leaf in the pytree of parameters, outermost first.
      shape: of the leaf; a size that the mesh axis does not divide stays whole.
      size: of the mesh axis `model`.
    """
    axis = next((SPLIT_AXIS[key] for key in path if key in SPLIT_AXIS), None)
    if axis == IN and path[-1] == "bias":
        axis = None  # added once, after the sum
    if axis is None or shape[axis] % size:
        return PartitionSpec()
    spec = [None] * len(shape)
    spec[axis] = MODEL
    return PartitionSpec(*spec)


def leaf_sharding(path: Sequence[str], shape: Sequence[int], mesh: Mesh | None):
    """Sharding of one leaf; without a mesh, the first device."""
    if mesh is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    return NamedSharding(mesh, leaf_spec(path, shape, mesh.shape.get(MODEL, 1)))


def is_shared(mesh: Mesh | None) -> bool:
    """Whether the devices of a mesh are CPU cores that hold the same arrays."""
    if mesh is None or mesh.size == 1 or mesh.shape.get(MODEL, 1) > 1:
        return False
    return mesh.devices.flat[0].platform == "cpu"


def share(tree, mesh: Mesh):
    """Arrays of the first core for all cores of a mesh (in this process), without a copy.

    The cores then read the same memory, of which more fits into the cache that they share.
    """
    sharding = NamedSharding(mesh, PartitionSpec())

    def one(x):
        # A view of the first core's buffer; the others take it over as it is.
        view = np.asarray(x.addressable_data(0))
        devices = sorted(sharding.addressable_devices, key=lambda d: d.id)
        parts = [jax.device_put(view, device, may_alias=True) for device in devices]
        return jax.make_array_from_single_device_arrays(x.shape, sharding, parts)

    return jax.tree.map(one, tree)
