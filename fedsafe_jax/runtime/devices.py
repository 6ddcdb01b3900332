"""The devices that a command computes on, and a loud word where jax overlooks better ones.

    python -m fedsafe_jax.runtime.devices

prints the devices, and ends with code 1 and one line where an accelerator is overlooked.
"""

import collections
import importlib.metadata
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax

# The names that clouds use, where jax has others.
TPU_NAMES = {"TPU v5 lite": "TPU v5e", "TPU v5": "TPU v5p", "TPU v6 lite": "TPU v6e"}
# A TPU runtime or its node pool sets these; nothing is asked over the network.
TPU_VARIABLES = ("TPU_NAME", "TPU_WORKER_ID", "TPU_ACCELERATOR_TYPE")
CUDA_PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin")


class Gpu(NamedTuple):
    """What `nvidia-smi` says of a GPU.

    Attributes:
      name: such as "Tesla T4".
      driver: version of the driver, such as "580.82.07".
      capability: compute capability, such as 7.5.
    """

    name: str
    driver: str
    capability: float


def describe(devices: Sequence[jax.Device] | None = None) -> str:
    """Returns the devices of all processes in words, such as "8 x TPU v5e on 2 hosts".

    Args:
      devices: None for all that jax has.
    """
    devices = jax.devices() if devices is None else devices
    kinds = collections.Counter(TPU_NAMES.get(d.device_kind, d.device_kind) for d in devices)
    text = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    processes = len({d.process_index for d in devices})
    if processes == 1:
        return text
    # A TPU host runs one process; hosts of GPUs and CPUs may run several.
    on_hosts = devices[0].platform == "tpu"
    return f"{text} {f'on {processes} hosts' if on_hosts else f'in {processes} processes'}"


def nvidia_gpus() -> list[Gpu]:
    """Returns the GPUs that `nvidia-smi` lists; [] where it is missing or fails."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        rows = [line.rsplit(", ", 2) for line in done.stdout.splitlines() if line.strip()]
        return [Gpu(name, driver, float(capability)) for name, driver, capability in rows]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


def cuda_extra(gpu: Gpu) -> str:
    """Returns the extra whose CUDA the GPU and its driver can run, cuda12 or cuda13.

    CUDA 13 needs driver 580, and left out the GPUs before Turing (compute capability 7.5).
    """
    new = int(gpu.driver.partition(".")[0]) >= 580 and gpu.capability >= 7.5
    return "cuda13" if new else "cuda12"


def tpu_sign(environment: Mapping[str, str], dev: pathlib.Path = pathlib.Path("/dev")) -> str:
    """Returns what says that this machine has a TPU; "" where nothing does.

    Args:
      environment: environment variables by name.
      dev: folder of the device files.
    """
    files = sorted([*dev.glob("accel[0-9]*"), *dev.glob("vfio/[0-9]*")])
    if files:
        return str(files[0])
    return next(
        (f"{name}={environment[name]}" for name in TPU_VARIABLES if name in environment), ""
    )


def overlooked(environment: Mapping[str, str]) -> str:
    """Returns one line on an accelerator that is here while jax is on the CPU; "" if none is.

    Nothing is said where the CPU was asked for, by `JAX_PLATFORMS=cpu`, or the GPUs were hidden by
    an empty `CUDA_VISIBLE_DEVICES`.

    Args:
      environment: environment variables by name.
    """
    asked = (jax.config.jax_platforms or "").split(",")[0]
    if asked == "cpu" or any(device.platform != "cpu" for device in jax.devices()):
        return ""
    here = f"but jax {jax.__version__} computes on the CPU"
    meant = "(if the CPU is meant: JAX_PLATFORMS=cpu)"
    hidden = environment.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1", "NoDevFiles")
    gpus = [] if hidden else nvidia_gpus()
    if gpus:
        gpu = f"{len(gpus)} x {gpus[0].name} is here (driver {gpus[0].driver})"
        return f"{gpu}, {here}: {_cuda_fault(gpus[0])} {meant}"
    if sign := tpu_sign(environment):
        install = f"pip install 'jax[tpu]=={jax.__version__}'"
        return f"a TPU is here ({sign}), {here}: {install}, and end what else uses it {meant}"
    return ""


def _cuda_fault(gpu: Gpu) -> str:
    """Says why jax cannot use the GPU, and what to install."""
    major = int(gpu.driver.partition(".")[0])
    if major < 525:
        return "CUDA 12 needs driver 525 or newer; update the driver."
    extra = cuda_extra(gpu)
    wanted, faults = _version("jaxlib"), []
    for plugin in CUDA_PLUGINS:
        version = _version(plugin)
        if version and version != wanted:
            faults.append(f"{plugin} {version} does not pair with jaxlib {wanted}")
        elif version and plugin == "jax-cuda13-plugin" and extra == "cuda12":
            faults.append(f"{plugin} needs driver 580 and a GPU of Turing or newer")
        elif version:
            return f"{plugin} {version} finds no GPU; restart, and see what JAX_PLATFORMS=cuda says"
    install = f"pip install 'jax[{extra}]=={jax.__version__}', then start again"
    return f"{' and '.join(faults) or 'no CUDA plugin is installed'}; {install}"


def _version(package: str) -> str:
    """The installed version of a package, "" without it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def announce() -> None:
    """Prints the devices, in the first process, and a warning where an accelerator is overlooked.

    Both go to stderr, in lines of their own, as a command's results go to stdout.
    """
    if jax.process_index() == 0:
        print(f"devices: {describe()}", file=sys.stderr, flush=True)
    if warning := overlooked(os.environ):
        print(f"WARNING: {warning}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    print(f"devices: {describe()}", flush=True)
    sys.exit(overlooked(os.environ) or 0)
