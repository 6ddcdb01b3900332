"""How a process finds the others: by environment, and on a TPU VM by its metadata server."""

import http.server
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time

import jax
import pytest

from fedsafe_jax.runtime import cluster, multihost

WORKER = pathlib.Path(__file__).with_name("join_worker.py")
OPEN_MPI_4 = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.0.0.1:1"}


def given(address="a:1", count="2", own="1"):
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    return dict(zip(names, (address, count, own), strict=True))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_STEP_NUM_TASKS": "4"}, {}),
        (OPEN_MPI_4, {}),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, {}),
        ({"MEGASCALE_NUM_SLICES": "2"}, {}),
        (given(), {"coordinator_address": "a:1", "num_processes": 2, "process_id": 1}),
        ({"FEDSAFE_DISTRIBUTED": "on"}, {}),
        (given() | OPEN_MPI_4 | {"FEDSAFE_DISTRIBUTED": "off"}, None),
        ({"FEDSAFE_DISTRIBUTED": "yes"}, "FEDSAFE_DISTRIBUTED=yes: expected on, off or auto"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "not JAX_NUM_PROCESSES, JAX_PROCESS_ID"),
        (given(count="x", own="0"), "expected two numbers"),
        (given(own="2"), "less than JAX_NUM_PROCESSES=2"),
        ({"SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS=many: expected a number"),
    ],
)
def test_clusters_are_recognised(environment, expected):
    if isinstance(expected, str):
        with pytest.raises(cluster.ClusterError, match=expected):
            cluster.arguments(environment)
    else:
        assert cluster.arguments(environment) == expected


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_other_mpis_need_mpi4py(monkeypatch, name):
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(cluster.ClusterError, match=f"{name}=2: .*pip install mpi4py"):
        cluster.arguments({name: "2"})
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: object())
    assert cluster.arguments({name: "2"}) == {"cluster_detection_method": "mpi4py"}


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [("1(x4)", {"local_device_ids": [0, 1, 2, 3]}), ("4(x2)", {}), ("1,2", {})],
)
def test_the_only_task_of_a_node_has_all_its_gpus(tasks, expected):
    environment = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": tasks}
    environment["CUDA_VISIBLE_DEVICES"] = "0,1,2,3"
    assert cluster.arguments(environment) == expected
    assert cluster.arguments(environment | {"JAX_LOCAL_DEVICE_IDS": "2"}) == {}


@pytest.fixture
def metadata():
    """Starts metadata servers with given attributes; returns the address of each."""
    servers = []

    def start(**attributes):
        class Answer(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                name = self.path.rpartition("/")[2].replace("-", "_")
                found = attributes.get(name) if self.headers["Metadata-Flavor"] else None
                self.send_response(404 if found is None else 200)
                self.end_headers()
                self.wfile.write((found or "").encode())

            def log_message(self, *args):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"worker_network_endpoints": "w:0:10.0.0.1,w:1:10.0.0.2"}, {}),
        ({"worker_network_endpoints": "w:0:10.0.0.1"}, None),
        ({"worker_network_endpoints": "w", "tpu_env": "A: 'b'\nMEGASCALE_NUM_SLICES: '2'\n"}, {}),
        ({"worker_network_endpoints": "w", "tpu_env": "MEGASCALE_NUM_SLICES: '1'"}, None),
        ({}, None),
    ],
)
def test_a_tpu_vm_asks_its_metadata_server(metadata, attributes, expected):
    environment = {"GCE_METADATA_IP": metadata(**attributes)}
    assert cluster.arguments(environment, tpu_vm=True) == expected
    assert cluster.arguments(environment, tpu_vm=False) is None
    assert cluster.arguments(environment | {"TPU_SKIP_MDS_QUERY": "1"}, tpu_vm=True) is None


def test_a_tpu_vm_without_a_metadata_server_starts_alone_and_soon(monkeypatch):
    monkeypatch.setattr(cluster, "METADATA_TIMEOUT_S", 0.2)
    with socket.socket() as silent:  # accepts, and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        started = time.monotonic()
        assert cluster.arguments({"GCE_METADATA_IP": address}, tpu_vm=True) is None
        assert time.monotonic() - started < 2


def test_nothing_asks_the_network_where_there_are_no_chips(monkeypatch):
    def refuse(*args):
        raise AssertionError("asked the network")

    monkeypatch.setattr(cluster, "_metadata", refuse)
    assert not cluster.on_tpu_vm()
    assert cluster.arguments({}, cluster.on_tpu_vm()) is None


def test_a_slice_that_was_not_joined_is_one_line(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    for meet in (multihost.check_joined, lambda: multihost.barrier("round")):
        with pytest.raises(cluster.ClusterError, match="slice has 4 hosts.*DISTRIBUTED=on"):
            meet()


def started(variables, *flags):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "TPU", "JAX"))}
    environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""} | variables
    return subprocess.Popen(
        [sys.executable, WORKER, *flags],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["slurm", "gke", "tpu_vm"])
def test_two_processes_find_each_other(metadata, kind):
    """jax's own detection, at the variables and answers that each kind of cluster gives."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = {"JAX_COORDINATOR_PORT": str(probe.getsockname()[1])}
    flags, of = (), []
    for i in range(2):
        chips = {"JAX_FORCE_TPU_INIT": "1"}  # as if there were some
        if kind == "slurm":
            of.append({
                "SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2",
                "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(i), "SLURM_LOCALID": "0",
            })  # fmt: skip
        elif kind == "gke":
            hosts = {"TPU_WORKER_HOSTNAMES": "localhost,localhost", "TPU_WORKER_ID": str(i)}
            of.append(chips | hosts | {"GCE_METADATA_IP": metadata(tpu_env="")})
        else:
            server = metadata(
                worker_network_endpoints="w:0:127.0.0.1,w:1:127.0.0.1",
                agent_worker_number=str(i),
                tpu_env="ZONE: 'here'",
            )
            of.append(chips | {"GCE_METADATA_IP": server, "FEDSAFE_DISTRIBUTED": "on"})
            flags = ("--tpu-vm",)
    processes = [started(variables | port, *flags) for variables in of]
    for i, process in enumerate(processes):
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-3000:]
        assert out.split() == ["joined", str(i), "2", str(i == 0)]


def test_a_tpu_vm_of_one_host_joins_when_told_to(metadata):
    server = metadata(
        worker_network_endpoints="w:0:127.0.0.1", agent_worker_number="0", tpu_env="ZONE: 'here'"
    )
    process = started(
        {"JAX_FORCE_TPU_INIT": "1", "GCE_METADATA_IP": server, "FEDSAFE_DISTRIBUTED": "on"},
        "--tpu-vm",
    )
    out, errors = process.communicate(timeout=120)
    assert out.split() == ["joined", "0", "1", "True"], errors[-3000:]


def test_on_without_a_cluster_is_one_line():
    process = started({"FEDSAFE_DISTRIBUTED": "on"})
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and "Traceback" not in errors
    assert "refused: the other processes are not found" in errors
