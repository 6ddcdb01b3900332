"""Devices that programs are compiled for, without having them: TPU slices, H100s, CPU cores."""

import importlib.util
import math
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from jax.sharding import Mesh


GIB = 2**30
# Chips by generation: bytes of memory that the compiler has for a program, less than 16, 32 and 96
# GiB, and the topologies of their slices that libtpu knows.
TPUS = {
    "v5e": (int(15.75 * GIB), ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")),
    "v6e": (int(31.25 * GIB), ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")),
    "v5p": (
        int(95.74 * GIB),
        ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"),
    ),
}
H100_MEMORY = 84929347584
MOST_GPUS = 8  # of one host
# What the CUDA plugin needs to know of a GPU that is not there: the figures of an H100 SXM.
H100 = f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: {H100_MEMORY} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }} registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "NVIDIA H100 80GB HBM3"
"""
KNOWN = (
    "v5e:2x2 (or 2x4, 4x4, ...), v6e:2x4, v5p:2x2x1, v5e, v6e or v5p (a chip), h100, h100:2, cpu"
)
EXTRA = "pip install -e .[aot]"


class TargetError(ValueError):
    """The target is not known, or what compiles for it is not installed."""


class Target(NamedTuple):
    """Devices to compile for.

    Attributes:
      name: name as given, such as "v5e:2x2".
      platform: platform of the lowering: `tpu`, `cuda` or `cpu`.
      kind: generation of TPU, "h100" or "cpu".
      topology: shape of the slice, as libtpu names it; for others the number of devices.
      memory: bytes of a device that programs may use; 0 for a CPU, whose devices share the host's.
    """

    name: str
    platform: str
    kind: str
    topology: str
    memory: int


def parse(name: str) -> Target:
    """Reads the name of a target.

    Raises:
      TargetError: no such target; the message has the known ones.
    """
    kind, _, shape = name.partition(":")
    if kind in TPUS:
        memory, topologies = TPUS[kind]
        if not shape:
            shape = topologies[0]
        if shape in topologies:
            return Target(name, "tpu", kind, topology=shape, memory=memory)
        raise TargetError(f"--target={name}: {kind} has {', '.join(topologies)}.")
    most = {"h100": MOST_GPUS, "cpu": 64}.get(kind)
    if most and (not shape or shape.isdecimal() and 1 <= int(shape) <= most):
        platform, memory = ("cuda", H100_MEMORY) if kind == "h100" else ("cpu", 0)
        return Target(name, platform, kind, topology=shape or "1", memory=memory)
    raise TargetError(f"--target={name}: no such target; known are {KNOWN}.")


def prepare(target: Target) -> None:
    """Sets what a target's compiler reads from the environment; before jax looks for devices.

    Raises:
      TargetError: the compiler is not installed.
    """
    needed = {"tpu": ("libtpu",), "cuda": ("jax_cuda12_plugin", "jax_cuda13_plugin"), "cpu": ()}
    packages = needed[target.platform]
    if packages and not any(map(importlib.util.find_spec, packages)):
        raise TargetError(f"--target={target.name}: {packages[0]} is not installed; {EXTRA}")
    # libtpu then neither asks a metadata server, nor locks out a second process.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="true")
    import jax

    # The process itself computes on the CPU, whatever devices there are.
    jax.config.update("jax_platforms", "cpu")
    if target.platform == "cpu":
        jax.config.update("jax_num_cpu_devices", int(target.topology))
    # A program for another machine must never be read back as one of this.
    jax.config.update("jax_enable_compilation_cache", False)


def devices(target: Target) -> Sequence:
    """Returns the devices of a target, as `make_mesh` takes them.

    Raises:
      TargetError: the compiler does not know the topology.
    """
    import jax
    from jax.experimental import topologies

    if target.platform == "cpu":
        return jax.devices()
    if target.platform == "cuda":
        _without_a_gpu()
        return topologies.get_topology_desc(
            platform="cuda",
            topology_name="h100",
            target_config=H100,
            topology=f"1x1x{target.topology}",
        ).devices
    name, more = f"{target.kind}:{target.topology}", {}
    if set(target.topology) == {"1", "x"}:
        more = {
            "chip_config_name": "default",
            "chips_per_host_bounds": (1, 1, 1),
            "num_slices": 1,
            "wrap": (False,) * 3,
        }
    try:
        return topologies.get_topology_desc(name, platform="tpu", **more).devices
    except jax.errors.JaxRuntimeError as error:
        raise TargetError(f"--target={target.name}: {str(error).splitlines()[0]}") from None


def part(target: Target, count: int) -> Target | None:
    """Returns a slice of `count` chips of a slice's kind, None where none is smaller than it.

    The compiler for a slice of TPU fails on collectives of some of its chips, unless these are
    numbered from 0 on, as they are in a slice of their own: a host's four chips of a v5e:4x4 are 0,
    1, 4 and 5.

    Args:
      target: the devices of a run.
      count: chips that some of its programs run on.
    """
    if target.platform != "tpu" or _chips(target.topology) == count:
        return None
    shape = next((x for x in TPUS[target.kind][1] if _chips(x) == count), None)
    return target._replace(topology=shape) if shape else None


def _chips(topology: str) -> int:
    return math.prod(map(int, topology.split("x")))


def _without_a_gpu() -> None:
    """Lets jax lower cuDNN calls for Hopper where no GPU says what it can do."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    cudnn.check_compute_capability = lambda capability: float(capability) <= 9.0
    cudnn.is_cuda_compute_capability_equal = lambda capability: capability == "9.0"
    cudnn.check_cudnn_version = lambda: 91200


def around(mesh: "Mesh") -> AbstractContextManager:
    """Returns the context that a program is lowered in.

    From jax 0.11 on, Triton kernels ask the abstract device of the mesh for its capability.
    """
    import jax

    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
