"""The device mesh: one axis, `clients`."""

import jax
from jax.sharding import AxisType, Mesh

CLIENTS = "clients"


def make_mesh(devices=None) -> Mesh:
    """A mesh of all devices along `clients`, with automatic axes (linen needs them)."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (CLIENTS,), axis_types=(AxisType.Auto,), devices=devices)
