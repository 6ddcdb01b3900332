"""The device mesh: clients are split along `clients`, the base model along `model`."""

import os

import jax
from jax.sharding import AxisType, Mesh

from fedsafe_jax.models.decoder_config import ModelError
from fedsafe_jax.models.sharding import CLIENTS, MODEL


def use_cores(most: int) -> None:
    """Gives each CPU core a device of its own, at most `most`; before jax computes anything.

    Small matrix products gain less from a second core than clients, or rows of generation, gain
    from not sharing one. Nothing changes where XLA_FLAGS already sets the number, or on
    accelerators.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        jax.config.update("jax_num_cpu_devices", max(1, min(cores, most)))


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


def cores(mesh: Mesh) -> Mesh | None:
    """The mesh, where its devices are cores of this machine: each has all there is in its reach, so
    they can share the work of all clients (`LocalTraining.mesh`). None elsewhere."""
    here = jax.default_backend() == "cpu" and jax.process_count() == 1
    return mesh if here and mesh.shape[MODEL] == 1 else None
