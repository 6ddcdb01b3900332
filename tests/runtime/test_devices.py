"""Devices in words, and the warning on a GPU or TPU that jax overlooks."""

import os
import pathlib
import subprocess
import sys
import types

import jax
import pytest

from fedsafe_jax.runtime import devices

T4 = devices.Gpu("Tesla T4", "550.54.15", 7.5)


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Puts an `nvidia-smi` on PATH that prints the given rows, or fails."""

    def install(*rows, code=0):
        file = tmp_path / "bin" / "nvidia-smi"
        file.parent.mkdir(exist_ok=True)
        text = "".join(f"echo '{row}'\n" for row in rows)
        file.write_text(f"#!/bin/sh\n{text}exit {code}\n")
        file.chmod(0o755)
        monkeypatch.setenv("PATH", f"{file.parent}{os.pathsep}{os.environ['PATH']}")

    return install


@pytest.fixture
def nothing_asked(monkeypatch):
    """The process as one in which nobody asked for the CPU, on a machine without a TPU."""
    monkeypatch.setattr(devices.jax, "config", types.SimpleNamespace(jax_platforms=None))
    monkeypatch.setattr(devices, "tpu_sign", lambda environment: environment.get("TPU_NAME", ""))


def device(kind, process=0, platform="tpu"):
    return types.SimpleNamespace(device_kind=kind, process_index=process, platform=platform)


@pytest.mark.parametrize(
    ("found", "text"),
    [
        ([device("NVIDIA H100 80GB HBM3", platform="gpu")], "1 x NVIDIA H100 80GB HBM3"),
        ([device("TPU v5 lite", i // 4) for i in range(8)], "8 x TPU v5e on 2 hosts"),
        ([device("TPU v5")], "1 x TPU v5p"),
        ([device("cpu", platform="cpu")] * 2, "2 x cpu"),
        ([device("cpu", i, platform="cpu") for i in range(2)], "2 x cpu in 2 processes"),
    ],
)
def test_devices_are_named(found, text):
    assert devices.describe(found) == text


def test_the_process_has_the_devices_that_jax_lists():
    assert devices.describe() == f"{len(jax.devices())} x cpu"


def test_gpus_are_read_from_nvidia_smi(smi):
    smi("Tesla T4, 550.54.15, 7.5", "NVIDIA H100 80GB HBM3, 550.54.15, 9.0")
    assert devices.nvidia_gpus() == [T4, devices.Gpu("NVIDIA H100 80GB HBM3", "550.54.15", 9.0)]


@pytest.mark.parametrize(
    ("row", "code"), [("NVIDIA-SMI has failed", 9), ("NVIDIA-SMI has failed", 0), ("", 0)]
)
def test_an_nvidia_smi_that_fails_lists_none(smi, row, code):
    smi(row, code=code)
    assert devices.nvidia_gpus() == []


# What NVIDIA documents: CUDA 13 needs driver 580, and no longer runs on Volta and Pascal.
EXTRAS = [
    ("580.82.07", 7.5, "cuda13"),
    ("580.82.07", 9.0, "cuda13"),
    ("590.10", 10.0, "cuda13"),
    ("580.82.07", 7.0, "cuda12"),
    ("580.82.07", 6.0, "cuda12"),
    ("575.51.03", 9.0, "cuda12"),
    ("525.60.13", 8.0, "cuda12"),
]


@pytest.mark.parametrize(("driver", "capability", "extra"), EXTRAS)
def test_the_extra_is_what_driver_and_gpu_can_run(driver, capability, extra):
    assert devices.cuda_extra(devices.Gpu("", driver, capability)) == extra


def test_a_tpu_is_seen_by_its_device_files_or_variables(tmp_path):
    assert devices.tpu_sign({}, tmp_path) == ""
    (tmp_path / "vfio").mkdir()
    (tmp_path / "vfio" / "vfio").touch()  # the driver alone, without a device
    (tmp_path / "accel").mkdir()  # accelerators of other makers
    assert devices.tpu_sign({"PATH": "/bin"}, tmp_path) == ""
    assert devices.tpu_sign({"TPU_WORKER_ID": "0"}, tmp_path) == "TPU_WORKER_ID=0"
    (tmp_path / "vfio" / "0").touch()
    assert devices.tpu_sign({}, tmp_path) == str(tmp_path / "vfio" / "0")
    (tmp_path / "accel0").touch()
    assert devices.tpu_sign({}, tmp_path) == str(tmp_path / "accel0")


def test_an_overlooked_gpu_is_one_line_with_what_to_install(smi, nothing_asked, monkeypatch):
    smi("Tesla T4, 550.54.15, 7.5")
    monkeypatch.setattr(devices, "_version", lambda p: "0.10.2" if p == "jaxlib" else "")
    line = devices.overlooked({})
    assert line.startswith("1 x Tesla T4 is here (driver 550.54.15), but jax ")
    assert "no CUDA plugin is installed; pip install 'jax[cuda12]==" in line and "\n" not in line


def test_a_plugin_of_another_release_is_named(smi, nothing_asked, monkeypatch):
    smi("Tesla T4, 580.82.07, 7.5")
    found = {"jaxlib": "0.10.2", "jax-cuda12-plugin": "0.7.2"}
    monkeypatch.setattr(devices, "_version", lambda package: found.get(package, ""))
    line = devices.overlooked({})
    assert "jax-cuda12-plugin 0.7.2 does not pair with jaxlib 0.10.2; pip install" in line
    assert "'jax[cuda13]==" in line


def test_a_plugin_that_pairs_is_not_to_be_installed_again(smi, nothing_asked, monkeypatch):
    smi("Tesla T4, 580.82.07, 7.5")
    monkeypatch.setattr(devices, "_version", lambda package: "0.10.2")
    line = devices.overlooked({})
    assert "jax-cuda12-plugin 0.10.2 finds no GPU; restart" in line and "pip" not in line


def test_a_cuda_that_the_driver_cannot_run_is_named(smi, nothing_asked, monkeypatch):
    smi("Tesla T4, 550.54.15, 7.5")
    monkeypatch.setattr(devices, "_version", lambda p: "" if "cuda12" in p else "0.10.2")
    line = devices.overlooked({})
    assert "jax-cuda13-plugin needs driver 580" in line and "pip install 'jax[cuda12]==" in line


def test_a_driver_that_is_too_old_is_named(smi, nothing_asked):
    smi("Tesla K80, 470.82.01, 3.7")
    assert "CUDA 12 needs driver 525 or newer" in devices.overlooked({})


def test_an_overlooked_tpu_is_one_line(smi, nothing_asked):
    smi(code=9)
    line = devices.overlooked({"TPU_NAME": "v5e"})
    assert line.startswith("a TPU is here (v5e), but jax ") and "jax[tpu]==" in line


def test_hidden_gpus_and_none_are_no_fault(smi, nothing_asked):
    smi("Tesla T4, 550.54.15, 7.5")
    assert devices.overlooked({"CUDA_VISIBLE_DEVICES": ""}) == ""
    smi(code=9)
    assert devices.overlooked({}) == ""


@pytest.mark.parametrize(("platforms", "warned"), [("", True), ("cpu", False)])
def test_a_command_warns_unless_the_cpu_was_asked_for(smi, monkeypatch, platforms, warned):
    smi("Tesla T4, 550.54.15, 7.5")
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    root = str(pathlib.Path(devices.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-m", "fedsafe_jax.runtime.devices"],
        cwd=root, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.startswith("devices: ") and done.stdout.endswith(" x cpu\n")
    assert done.returncode == (1 if warned else 0)
    last = (done.stderr.splitlines() or [""])[-1]
    assert last.startswith("1 x Tesla T4 is here") == warned


def test_announcing_writes_lines_of_their_own_to_stderr(monkeypatch, capsys):
    monkeypatch.setattr(devices, "overlooked", lambda environment: "look")
    devices.announce()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [f"devices: {len(jax.devices())} x cpu", "WARNING: look"]
