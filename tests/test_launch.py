"""What the launch scripts run, and a run in two processes against one."""

import os
import shlex
import shutil
import subprocess

import numpy as np
import pytest
from commands import ENVIRONMENT, ROOT, SMALL, run
from safetensors.numpy import load_file

from fedsafe_jax.runtime import multihost

SCRIPT = ROOT / "launch" / "local_multiprocess.sh"


def launch(*arguments, **variables):
    import sys

    environment = ENVIRONMENT | {"PYTHON": sys.executable} | variables
    return subprocess.run(
        ["bash", SCRIPT, *map(str, arguments)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def test_the_dry_run_prints_a_command_a_process():
    done = launch("--dry-run", 2, "--config=configs/demo.py", "--workdir=/tmp/a b", PORT="1234")
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and len(lines) == 2
    for i, line in enumerate(lines):
        assert {"JAX_COORDINATOR_ADDRESS=localhost:1234", f"JAX_PROCESS_ID={i}"} < set(line)
        assert line[-4:] == [
            "fedsafe_jax", "run", "--config=configs/demo.py", "--workdir=/tmp/a b",
        ]  # fmt: skip


@pytest.mark.parametrize("arguments", [(), ("two", "--config=a"), ("2",), ("0", "--config=a")])
def test_wrong_use_prints_the_usage(arguments):
    done = launch(*arguments)
    assert done.returncode == 2 and done.stderr.startswith("usage: local_multiprocess.sh")


def test_two_processes_end_with_the_adapter_of_one(tmp_path, monkeypatch):
    # The programs that users run fuse; without that, rounding differs more between the two.
    fused = ENVIRONMENT["XLA_FLAGS"].replace("--xla_cpu_use_fusion_emitters=false", "")
    monkeypatch.setitem(ENVIRONMENT, "XLA_FLAGS", fused)
    settings = ("arms=('fl+filter+cai',)", "rounds=2", "clients_per_round=3")
    # The same programs in both: the cores of one process would deal out rows, and sum otherwise.
    settings += ("filter.kind=simulated", "clients_in_parallel=1")
    fields = dict(s.split("=", 1) for s in (*SMALL, *settings))
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    done = launch(2, "--config=configs/demo.py", f"--workdir={tmp_path / 'two'}", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("report: ") == 1  # the first process alone speaks
    run(tmp_path / "one", *settings)
    found = [
        load_file(tmp_path / name / "export/adapter/adapter_model.safetensors")
        for name in ("one", "two")
    ]
    for name, value in found[0].items():
        # Sums in another order, which Adam magnifies where gradients are tiny.
        np.testing.assert_allclose(found[1][name], value, atol=2e-5)
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("one", "two")]
    assert len(lines[0].splitlines()) == len(lines[1].splitlines()) == 2


def test_a_process_that_fails_ends_the_others(tmp_path):
    done = launch(2, "--config=configs/demo.py", f"--workdir={tmp_path}", "--config.rounds=0")
    assert done.returncode != 0 and "rounds=0: expected at least 1" in done.stderr


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_STEP_NUM_TASKS": "4"}, {}),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "a:1",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": "1",
            },
            {"coordinator_address": "a:1", "num_processes": 2, "process_id": 1},
        ),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "not JAX_NUM_PROCESSES, JAX_PROCESS_ID"),
        (
            {"JAX_COORDINATOR_ADDRESS": "a", "JAX_NUM_PROCESSES": "x", "JAX_PROCESS_ID": "0"},
            "expected two numbers",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "a", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
            "less than JAX_NUM_PROCESSES=2",
        ),
    ],
)
def test_clusters_are_recognised(environment, expected):
    if isinstance(expected, str):
        with pytest.raises(multihost.ClusterError, match=expected):
            multihost.cluster_args(environment)
    else:
        assert multihost.cluster_args(environment) == expected


BUCKET = "--workdir=gs://bucket/run"


def script(name, *arguments, **variables):
    return subprocess.run(
        ["bash", ROOT / "launch" / name, *arguments],
        cwd=ROOT, env=ENVIRONMENT | variables, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_a_tpu_run_creates_installs_starts_and_follows():
    arms = "--config.arms=('fl',)"
    done = script(
        "tpu_vm.sh", "--dry-run", "run", "--config=configs/paper.py", BUCKET, arms,
        PROJECT="p", ZONE="z", NAME="mine", TYPE="v5p-64",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert [line[3:6] for line in lines if line[0] == "gcloud"] == [
        ["queued-resources", "create", "mine"], ["tpu-vm", "scp", lines[2][5]],
        ["tpu-vm", "ssh", "mine"], ["tpu-vm", "ssh", "mine"], ["tpu-vm", "ssh", "mine"],
    ]  # fmt: skip
    assert {"--spot", "--accelerator-type=v5p-64", "--project=p", "--zone=z"} < set(lines[0])
    # What the hosts' shells make of the command, twice quoted on its way.
    command = lines[4][-1].removeprefix("--command=")
    inner = shlex.split(command)
    loop = shlex.split(inner[inner.index("-c") + 1])
    assert loop[loop.index(".venv/bin/fedsafe") + 1 :][:4] == [
        "run", "--config=configs/paper.py", BUCKET, arms,
    ]  # fmt: skip
    on_demand = script(
        "tpu_vm.sh", "--dry-run", "create", PROJECT="p", ZONE="z", SPOT="0"
    )  # fmt: skip
    assert "--spot" not in on_demand.stdout


def test_a_gke_workload_and_a_slurm_job():
    done = script(
        "gke_xpk.sh", "--dry-run", "--config=a b.py", BUCKET,
        CLUSTER="c", PROJECT="p", ZONE="z", SLICES="2",
    )  # fmt: skip
    (line,) = [shlex.split(line) for line in done.stdout.splitlines()]
    assert line[:3] == ["xpk", "workload", "create"]
    assert {"--cluster=c", "--num-slices=2", "--tpu-type=v5litepod-16"} < set(line)
    assert shlex.split(line[-1])[-2:] == ["--config=a b.py", BUCKET]
    done = script("slurm.sbatch", "--dry-run", "--config=a", "--workdir=/s", PYTHON="/x/python")
    assert shlex.split(done.stdout) == [
        "srun", "--kill-on-bad-exit=1", "/x/python", "-m", "fedsafe_jax", "run",
        "--config=a", "--workdir=/s",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("tpu_vm.sh", ("fly",), "usage: tpu_vm.sh"),
        ("tpu_vm.sh", ("run", "--config=a", "--workdir=/tmp/a"), "give --workdir=gs://BUCKET/"),
        ("tpu_vm.sh", ("run", BUCKET), "give --config=FILE"),
        ("gke_xpk.sh", ("--config=a", "--workdir=/tmp/a"), "give --workdir=gs://BUCKET/"),
        ("gke_xpk.sh", ("--config=a", BUCKET), "no cluster: set CLUSTER"),
        ("slurm.sbatch", ("--config=a",), "usage: sbatch"),
        ("slurm.sbatch", ("--config=a", "--workdir=/s"), "not inside a SLURM job"),
    ],
)
def test_scripts_name_the_missing_piece(name, arguments, message):
    done = script(name, *arguments, CLUSTER="", SLURM_JOB_ID="")
    assert done.returncode != 0 and message in done.stderr


def test_scripts_need_their_tools(tmp_path):
    for tool in ("bash", "dirname", "env"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    path = {"PATH": str(tmp_path), "CLUSTER": "c"}
    done = script("tpu_vm.sh", "create", **path)
    assert done.returncode == 1 and "gcloud is not installed" in done.stderr
    done = script("gke_xpk.sh", "--config=a", BUCKET, **path)
    assert done.returncode == 1 and "xpk is not installed" in done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_scripts_pass_shellcheck():
    folder = ROOT / "launch"
    scripts = [*folder.glob("*.sh"), folder / "slurm.sbatch", *(ROOT / ".ci").iterdir()]
    scripts = sorted(map(str, scripts))
    done = subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert os.access(SCRIPT, os.X_OK)
