"""What the launch scripts run, and a run in two processes against one."""

import json
import os
import shlex
import shutil
import subprocess

import numpy as np
import pytest
from commands import ENVIRONMENT, NO_ANSWERS, ROOT, SMALL, run
from safetensors.numpy import load_file

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


@pytest.mark.slow
def test_two_processes_end_with_the_adapter_of_one(tmp_path, monkeypatch):
    # The programs that users run fuse; without that, rounding differs more between the two.
    fused = ENVIRONMENT["XLA_FLAGS"].replace("--xla_cpu_use_fusion_emitters=false", "")
    monkeypatch.setitem(ENVIRONMENT, "XLA_FLAGS", fused)
    settings = ("arms=('fl+filter+cai',)", "rounds=2", "clients_per_round=3", NO_ANSWERS)
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


@pytest.mark.slow
def test_a_base_on_two_hosts_gives_what_one_host_gives(tmp_path):
    """Generation, Constitutional AI, evaluation and export, half of the base in each process."""
    settings = ("arms=('base','fl+filter+cai')", "rounds=1", "model_parallel=2")
    settings += ("filter.kind=simulated", "clients_in_parallel=1", "eval.every_round_prompts=2")
    fields = dict(s.split("=", 1) for s in (*SMALL, *settings))
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    processes = {"one": "1", "two": "2"}
    for name, count in processes.items():
        devices = f"--xla_force_host_platform_device_count={2 // int(count)}"
        done = launch(
            count, "--config=configs/demo.py", f"--workdir={tmp_path / name}", *flags,
            XLA_FLAGS=f"{devices} {ENVIRONMENT['XLA_FLAGS']}",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = tmp_path / "one", tmp_path / "two"
    read = "cai/round_000.jsonl"
    assert (one / read).read_text() == (two / read).read_text()
    for arm in ("base", "fl+filter+cai"):
        texts = [(folder / f"arms/{arm}_seed0.json").read_text() for folder in (one, two)]
        # Time differs, and the hash of an adapter whose last bits do.
        apart = {"seconds", "adapter_sha256"}
        a, b = ({k: v for k, v in json.loads(t).items() if k not in apart} for t in texts)
        assert a.keys() == b.keys()
        for task, outcome in a.items():
            for name, values in outcome.items():
                if name == "nll":
                    np.testing.assert_allclose(b[task][name], values, atol=1e-4)
                else:  # answers, and what was made of them
                    assert values == b[task][name]
    for file in ("adapter/adapter_model.safetensors", "merged/model.safetensors"):
        found = [load_file(folder / "export" / file) for folder in (one, two)]
        assert found[0].keys() == found[1].keys()
        gaps = np.concatenate([np.abs(found[1][k] - v).ravel() for k, v in found[0].items()])
        # Sums in another order, which Adam magnifies where gradients are tiny.
        assert np.quantile(gaps, 0.99) < 2e-5 and gaps.max() < 5e-3
    names = [{p.name for p in (folder / "export").rglob("*")} for folder in (one, two)]
    assert names[0] == names[1]


def test_a_process_that_fails_ends_the_others(tmp_path):
    done = launch(2, "--config=configs/demo.py", f"--workdir={tmp_path}", "--config.rounds=0")
    assert done.returncode != 0 and "rounds=0: expected at least 1" in done.stderr


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
    loop = started_on_the_hosts(lines[4])
    assert "FEDSAFE_DISTRIBUTED=on" in loop
    assert loop[loop.index(".venv/bin/fedsafe") + 1 :][:4] == [
        "run", "--config=configs/paper.py", BUCKET, arms,
    ]  # fmt: skip
    on_demand = script(
        "tpu_vm.sh", "--dry-run", "create", PROJECT="p", ZONE="z", SPOT="0"
    )  # fmt: skip
    assert "--spot" not in on_demand.stdout


def started_on_the_hosts(line):
    """The words of the loop, as the hosts' shells make them of a command that is quoted twice."""
    inner = shlex.split(line[-1].removeprefix("--command="))
    return shlex.split(inner[inner.index("-c") + 1])


@pytest.mark.parametrize(("codes", "starts"), [("0", 1), ("2", 1), ("1 143 0", 3), ("1 2 0", 2)])
def test_the_loop_on_a_host_goes_on_after_crashes_alone(tmp_path, codes, starts):
    done = script(
        "tpu_vm.sh", "--dry-run", "run", "--config=a", BUCKET, "--config.arms=('a b',)",
        PROJECT="p", ZONE="z", FORWARD="HF_TOKEN", HF_TOKEN="it's one",
    )  # fmt: skip
    line = shlex.split(done.stdout.splitlines()[4])
    inner = shlex.split(line[-1].removeprefix("--command="))
    loop = inner[inner.index("-c") + 1]
    # A host with a command that ends with one code after another, and tells what it was given.
    fake = tmp_path / ".venv/bin/fedsafe"
    fake.parent.mkdir(parents=True)
    fake.write_text(
        '#!/usr/bin/env bash\nprintf "%s|" "$HF_TOKEN" "$FEDSAFE_DISTRIBUTED" "$@" >> calls\n'
        "echo >> calls\nread -r code rest < codes\necho $rest > codes\nexit $code\n"
    )
    fake.chmod(0o755)
    (tmp_path / "codes").write_text(codes + "\n")
    ran = subprocess.run(
        ["bash", "-c", loop.replace("sleep 30", "true")],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == [f"it's one|on|run|--config=a|{BUCKET}|--config.arms=('a b',)|"] * starts
    assert ran.stdout.strip() == f"ended with status {codes.split()[starts - 1]}"


def test_a_variable_that_is_not_set_is_not_forwarded():
    done = script("tpu_vm.sh", "--dry-run", "create", PROJECT="p", ZONE="z", FORWARD="NOT_HERE")
    assert done.returncode == 1 and "FORWARD: NOT_HERE is not set here" in done.stderr


def test_a_gke_workload_and_a_slurm_job():
    done = script(
        "gke_xpk.sh", "--dry-run", "--config=a b.py", BUCKET,
        CLUSTER="c", PROJECT="p", ZONE="z", SLICES="2",
    )  # fmt: skip
    (line,) = [shlex.split(line) for line in done.stdout.splitlines()]
    assert line[:3] == ["xpk", "workload", "create"]
    assert {"--cluster=c", "--num-slices=2", "--tpu-type=v5litepod-16"} < set(line)
    assert shlex.split(line[-1])[-2:] == ["--config=a b.py", BUCKET]
    assert "FEDSAFE_DISTRIBUTED=on" in shlex.split(line[-1])
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
