"""The device mesh: clients are split along `clients`, the base model along `model`."""

import os
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from fedsafe_jax.models.decoder_config import ModelError
from fedsafe_jax.models.sharding import CLIENTS, MODEL, platform_of


def use_cores(most: int) -> None:
    """Gives each CPU core a device of its own; to be called before jax computes anything.

    Small matrix products gain less from a second core than clients, or rows of generation, gain
    from not sharing one. Nothing changes where XLA_FLAGS already sets the number, or on
    accelerators.

    Args:
      most: greatest number of devices.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        jax.config.update("jax_num_cpu_devices", max(1, min(cores, most)))


def make_mesh(devices: Sequence[jax.Device] | None = None, model_parallel: int = 1) -> Mesh:
    """Returns a mesh `[clients, model]` with automatic axes (linen needs them).

    Args:
      devices: devices of the mesh; None for all.
      model_parallel: devices that share one copy of the base model.

    Raises:
      ModelError: `model_parallel` does not divide the number of devices.

    Example:
      >>> mesh = make_mesh(jax.devices()[:1])
      >>> dict(mesh.shape)
      {'clients': 1, 'model': 1}
    """
    devices = jax.devices() if devices is None else devices
    if len(devices) % model_parallel:
        raise ModelError(f"model_parallel={model_parallel} does not divide {len(devices)} devices.")
    shape = (len(devices) // model_parallel, model_parallel)
    axes = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh(shape, (CLIENTS, MODEL), axis_types=axes, devices=devices)


def clients_at_once(mesh: Mesh, asked: int, cohort: int) -> tuple[int, Mesh | None]:
    """Decides how clients are mapped to devices.

    Args:
      mesh: devices of the run.
      asked: clients that a device maps at once; 0: all of the cohort. The CPU cores of one process
        then share their rows, and CPUs of several processes take clients one by one.
      cohort: clients a round.

    Returns:
      `clients_in_parallel` of `make_round`, and `mesh` of `LocalTraining`.
    """
    if asked or platform_of(mesh) != "cpu":
        return asked or cohort, None
    if jax.process_count() == 1 and mesh.shape[MODEL] == 1:
        return 0, mesh
    return 1, None
