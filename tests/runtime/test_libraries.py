"""What the extra `aot` brings changes no other command: jax looks for the devices that are here."""

import importlib.metadata
import os
import subprocess
import sys
import types

import pytest
from commands import ENVIRONMENT, ROOT

from fedsafe_jax.runtime import libraries, native_notes


class Config(types.SimpleNamespace):
    def update(self, name, value):
        setattr(self, name, value)


@pytest.fixture
def process(monkeypatch, tmp_path):
    """A process that has not begun, with both compilers; a function that leaves out devices."""
    config, factories, read = Config(jax_platforms=None), {"tpu": 1, "cuda": 2, "cpu": 3}, []
    bridge = types.SimpleNamespace(
        backends_are_initialized=lambda: False,
        _backend_factories=factories,
        _discover_and_register_pjrt_plugins=lambda: read.append(True),
    )
    (tmp_path / "vfio").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(libraries, "jax", types.SimpleNamespace(config=config))
    monkeypatch.setattr(libraries, "xla_bridge", bridge)
    monkeypatch.setattr(libraries.cluster, "on_tpu_vm", lambda: False)
    monkeypatch.setattr(libraries.importlib.util, "find_spec", lambda name: name)

    def start(environment=(), plugins=("xla_cuda12",)):
        found = [types.SimpleNamespace(name=name) for name in plugins]
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: found)
        libraries.leave_out_absent_devices(dict(environment), tmp_path)
        return config.jax_platforms, set(factories)

    return types.SimpleNamespace(
        start=start, dev=tmp_path, config=config, bridge=bridge, read=read, patch=monkeypatch
    )


ALL = {"tpu", "cuda", "cpu"}


def test_without_a_device_the_cpu_is_used(process):
    assert process.start() == ("cpu", ALL)
    assert process.read  # the plugin's notes came, and were dropped


def test_without_the_extra_nothing_changes(process):
    process.patch.setattr(libraries.importlib.util, "find_spec", lambda name: None)
    assert process.start(plugins=()) == (None, ALL)
    assert not process.read


@pytest.mark.parametrize("sign", ["accel0", "vfio/0", "TPU_NAME", "jax"])
def test_a_tpu_is_left_alone(process, sign):
    environment = {}
    if sign == "jax":
        process.patch.setattr(libraries.cluster, "on_tpu_vm", lambda: True)
    elif sign.isupper():
        environment[sign] = "mine"
    else:
        (process.dev / sign).touch()
    assert process.start(environment) == (None, ALL)


def test_the_platforms_that_jax_sets_on_a_tpu_vm_stay(process):
    process.config.jax_platforms = "tpu,cpu"
    assert process.start() == ("tpu,cpu", ALL)


@pytest.mark.parametrize("file", ["nvidia0", "nvidiactl", "dxg", "nvidia-smi"])
def test_a_gpu_is_found_without_asking_for_a_tpu(process, file):
    (process.dev / file).touch(mode=0o755)
    assert process.start() == (None, {"cuda", "cpu"})
    assert not process.read


def test_what_was_asked_for_stays(process):
    process.config.jax_platforms = "cuda"
    assert process.start() == ("cuda", ALL)


def test_other_plugins_are_left_alone(process):
    assert process.start(plugins=("xla_cuda12", "rocm")) == (None, ALL)


def test_a_process_that_has_begun_is_left_alone(process):
    process.bridge.backends_are_initialized = lambda: True
    assert process.start() == (None, ALL)


def test_notes_are_dropped_and_the_rest_comes(capfd):
    with native_notes.without_notes():
        os.write(
            2, b"I0000 00:00:1.2   3 cudart_stub.cc:31] Could not find cuda drivers\nE: real\n"
        )
        subprocess.run([sys.executable, "-c", "import sys; print('child', file=sys.stderr)"])
    os.write(2, b"after cudart_stub.cc\n")
    assert capfd.readouterr().err == "E: real\nchild\nafter cudart_stub.cc\n"


def test_the_rest_comes_after_an_error_too(capfd):
    with pytest.raises(KeyError), native_notes.without_notes():
        os.write(2, b"said\n")
        raise KeyError
    assert capfd.readouterr().err == "said\n"


@pytest.mark.skipif(native_notes.has_gpu_files(), reason="a GPU is here")
def test_a_command_says_its_devices_and_nothing_else():
    """Of use where the extra is installed, as in .ci/compiles."""
    left = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    command = [sys.executable, "-m", "fedsafe_jax", "evaluate", "--max_prompts=1"]
    done = subprocess.run(command, capture_output=True, text=True, env=left, timeout=300)
    assert done.returncode == 0, done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("devices: ") and line.endswith(" x cpu")


def test_a_command_imports_no_torch():
    """Where torch is installed, as it is here for the comparisons."""
    pytest.importorskip("torch")
    code = """import sys
from fedsafe_jax.cli.startup import start_logging
start_logging()
from fedsafe_jax import load_pretrained
load_pretrained("package:model")
assert "transformers" in sys.modules and "torch" not in sys.modules
import importlib.util
assert importlib.util.find_spec("torch")"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, check=True)
