"""The device mesh: clients are split along `clients`, the base model along `model`."""

import os
from collections import defaultdict
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
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

    A copy of the base model lies inside one host wherever it fits, see `device_grid`.

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
    axes = (AxisType.Auto, AxisType.Auto)
    return Mesh(device_grid(devices, model_parallel), (CLIENTS, MODEL), axis_types=axes)


def device_grid(devices: Sequence[jax.Device], model_parallel: int) -> np.ndarray:
    """Deals devices out to copies of the base model, host by host.

    `jax.make_mesh` follows the torus of a TPU slice alone, and lays a copy over several hosts where
    one would hold it: every layer would then wait for the slower links, and no process could
    generate by itself. A copy that is larger than a host takes as few neighbouring hosts as it can.

    Args:
      devices: devices of all processes; a host is the devices of one process.
      model_parallel: devices of a copy; it divides their number.

    Returns:
      The devices, `[copies, model_parallel]`.
    """
    hosts = _hosts_in_order(devices)
    whole = [len(host) // model_parallel for host in hosts]
    rows = [
        _arranged(host[: count * model_parallel], (count, model_parallel))
        for host, count in zip(hosts, whole, strict=True)
        if count
    ]
    left = [
        device
        for host, count in zip(hosts, whole, strict=True)
        for device in host[count * model_parallel :]
    ]
    for start in range(0, len(left), model_parallel):
        rows.append(_arranged(left[start : start + model_parallel], (1, model_parallel)))
    return np.concatenate(rows)


def _hosts_in_order(devices: Sequence[jax.Device]) -> list[list[jax.Device]]:
    """Returns the devices by host, hosts that are near each other on a TPU's torus in a row."""
    by_process = defaultdict(list)
    for device in devices:
        by_process[device.process_index].append(device)
    hosts = [by_process[process] for process in sorted(by_process)]
    if devices[0].platform != "tpu":
        return hosts
    corners = [
        (_slice_of(host[0]), np.min([device.coords for device in host], axis=0)) for host in hosts
    ]
    # Places on the grid of hosts, whatever part of the slice a host holds.
    places = np.stack(
        [np.unique(axis, return_inverse=True)[1] for axis in np.transpose([c for _, c in corners])],
        axis=-1,
    )

    def along_curve(number: int):
        # The bits of the place, interleaved (Morton, 1966): each aligned power of two of hosts is a
        # box of the torus.
        place = [int(x) for x in places[number]]
        bits = (
            ((x >> bit) & 1) << (bit * len(place) + axis)
            for bit in range(16)
            for axis, x in enumerate(place)
        )
        return corners[number][0], sum(bits)

    return [hosts[i] for i in sorted(range(len(hosts)), key=along_curve)]


def _slice_of(device: jax.Device) -> int:
    """Returns the number of a TPU's slice; described topologies, unlike devices, have none."""
    return getattr(device, "slice_index", 0)


def _arranged(devices: Sequence[jax.Device], shape: tuple[int, int]) -> np.ndarray:
    """Lays devices in a grid, on a TPU such that neighbours are wired to each other."""
    if devices[0].platform == "tpu":
        extent = np.ptp([device.coords for device in devices], axis=0) + 1
        chips = len({tuple(device.coords) for device in devices})
        one_slice = len({_slice_of(device) for device in devices}) == 1
        if one_slice and np.prod(extent) == chips:  # else there is no box to follow
            return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    grid = np.empty(len(devices), object)
    grid[:] = devices
    return grid.reshape(shape)


def spans_hosts(mesh: Mesh) -> bool:
    """Returns whether a copy of the base lies on the devices of several processes.

    No process can then compute with the base alone: all run the same programs on the whole mesh.
    """
    copies = mesh.devices.reshape(-1, mesh.shape.get(MODEL, 1))
    return any(len({device.process_index for device in copy}) > 1 for copy in copies)


def clients_at_once(mesh: Mesh, asked: int) -> tuple[int, Mesh | None]:
    """Decides how clients are mapped to devices.

    Args:
      mesh: devices of the run.
      asked: clients that a device maps at once; 0: all of them together, whose rows the devices
        share. CPUs of several processes then take clients one by one.

    Returns:
      `clients_in_parallel` of `make_round`, and `mesh` of `LocalTraining`.
    """
    if asked:
        return asked, None
    if platform_of(mesh) != "cpu":
        return 0, mesh
    if jax.process_count() == 1 and mesh.shape[MODEL] == 1:
        return 0, mesh
    return 1, None
