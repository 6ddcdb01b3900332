"""Is this process one of several? What the environment and a TPU's metadata server say.

Nothing here asks the network unless the machine has TPU chips.
"""

import glob
import importlib.util
import urllib.error
import urllib.request
from collections.abc import Mapping

SWITCH = "FEDSAFE_DISTRIBUTED"  # environment variable: on, off, or auto
METADATA_TIMEOUT_S = 2.0  # the server is on the same machine; where there is none, nobody answers


class ClusterError(RuntimeError):
    """The environment describes a cluster that cannot be joined."""


def arguments(environment: Mapping[str, str], tpu_vm: bool = False) -> dict | None:
    """Returns the arguments of `jax.distributed.initialize` for this process.

    jax finds the others by itself among tasks of srun (SLURM) and of mpirun (Open MPI 4), and on
    the hosts of a TPU slice or multislice, by what GKE sets or by the metadata server of a plain
    TPU VM. Other MPIs need mpi4py. Everywhere else JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID say it. FEDSAFE_DISTRIBUTED=on joins wherever jax finds a cluster, even of one
    process; off never joins.

    Args:
      environment: environment variables by name.
      tpu_vm: whether this machine has TPU chips.

    Returns:
      Keyword arguments, {} for a cluster that jax detects; None for a single process.

    Raises:
      ClusterError: the variables are incomplete, or wrong.
    """
    switch = environment.get(SWITCH) or "auto"
    if switch not in ("on", "off", "auto"):
        raise ClusterError(f"{SWITCH}={switch}: expected on, off or auto.")
    given = _given(environment)
    if switch == "off":
        return None
    if given:
        return given | _all_gpus(environment)
    if _number(environment, "SLURM_STEP_NUM_TASKS") > 1:
        return _all_gpus(environment)
    if _number(environment, "OMPI_COMM_WORLD_SIZE") > 1 and "OMPI_MCA_orte_hnp_uri" in environment:
        return _all_gpus(environment)
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):  # Open MPI 5; MPICH, Intel MPI
        if (count := _number(environment, name)) > 1:
            if importlib.util.find_spec("mpi4py") is None:
                raise ClusterError(
                    f"{name}={count}: jax finds the processes of this MPI through mpi4py alone; "
                    "pip install mpi4py, or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
                    "JAX_PROCESS_ID in each process."
                )
            return {"cluster_detection_method": "mpi4py"}
    if switch == "on" or _several_tpu_hosts(environment, tpu_vm):
        return {}
    return None


def on_tpu_vm() -> bool:
    """Returns whether this machine has TPU chips and the library for them."""
    # What jax itself goes by. It found out while it was imported, from the list of PCI devices.
    from jax._src import cloud_tpu_init

    return bool(getattr(cloud_tpu_init, "running_in_cloud_tpu_vm", False))


def _given(environment: Mapping[str, str]) -> dict:
    """Reads the three variables that name a cluster; {} where none is set."""
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = [name for name in names if environment.get(name)]
    if not given:
        return {}
    if len(given) < len(names):
        missing = ", ".join(name for name in names if name not in given)
        raise ClusterError(f"{', '.join(given)} set, but not {missing}; set all or none.")
    try:
        count, own = (int(environment[name]) for name in names[1:])
    except ValueError:
        settings = ", ".join(f"{name}={environment[name]}" for name in names[1:])
        raise ClusterError(f"{settings}: expected two numbers.") from None
    if not 0 <= own < count:
        raise ClusterError(f"JAX_PROCESS_ID={own}: expected less than JAX_NUM_PROCESSES={count}.")
    return {
        "coordinator_address": environment[names[0]],
        "num_processes": count,
        "process_id": own,
    }


def _number(environment: Mapping[str, str], name: str) -> int:
    """Reads a count that a launcher sets; 0 without it."""
    try:
        return int(environment.get(name) or 0)
    except ValueError:
        raise ClusterError(f"{name}={environment[name]}: expected a number.") from None


def _all_gpus(environment: Mapping[str, str]) -> dict:
    """Returns all GPUs of a node as the devices of its only task.

    jax gives each task of SLURM and Open MPI one GPU, the one with the task's number on the node:
    a single task would leave the others idle.
    """
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE")
    single = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    if tasks:  # such as "1(x4)", or "2,1"
        single = {part.partition("(")[0] for part in tasks.split(",")} == {"1"}
    if not single or environment.get("JAX_LOCAL_DEVICE_IDS"):
        return {}
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    count = len(visible.split(",")) if visible else len(glob.glob("/dev/nvidia[0-9]*"))
    return {"local_device_ids": list(range(count))} if count > 1 else {}


def _several_tpu_hosts(environment: Mapping[str, str], tpu_vm: bool) -> bool:
    """Returns whether this is one of several hosts of a TPU slice or multislice."""
    if _number(environment, "MEGASCALE_NUM_SLICES") > 1:
        return True
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):  # of GKE
        if environment.get(name):
            return "," in environment[name]
    if not tpu_vm or environment.get("TPU_SKIP_MDS_QUERY"):
        return False
    server = environment.get("GCE_METADATA_IP") or "metadata.google.internal"
    if "," in _metadata(server, "worker-network-endpoints"):
        return True
    for line in _metadata(server, "tpu-env").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "MEGASCALE_NUM_SLICES":
            return value.strip(" '\"") not in ("", "1")
    return False


def _metadata(server: str, attribute: str) -> str:
    """Asks a virtual machine's metadata server; "" without an answer."""
    request = urllib.request.Request(
        f"http://{server}/computeMetadata/v1/instance/attributes/{attribute}",
        headers={"Metadata-Flavor": "Google"},
    )
    # Never through a proxy: the server is on the machine itself.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=METADATA_TIMEOUT_S) as answer:
            return answer.read().decode()
    except (urllib.error.URLError, OSError):
        return ""
