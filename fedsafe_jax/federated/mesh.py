"""The device mesh: clients are split along `clients`, the base model along `model`."""

import jax
from jax.sharding import AxisType, Mesh

from fedsafe_jax.models.decoder_config import ModelError
from fedsafe_jax.models.sharding import CLIENTS, MODEL


def make_mesh(devices=None, model_parallel: int = 1) -> Mesh:
    """A mesh `[clients, model]` with automatic axes (linen needs them).

    Args:
      devices: all of the process by default.
      model_parallel: devices that share one copy of the base model.

    Raises:
      ModelError: the devices cannot be divided so.
    """
    devices = jax.devices() if devices is None else devices
    if len(devices) % model_parallel:
        raise ModelError(f"model_parallel={model_parallel} does not divide {len(devices)} devices.")
    shape = (len(devices) // model_parallel, model_parallel)
    axes = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh(shape, (CLIENTS, MODEL), axis_types=axes, devices=devices)
