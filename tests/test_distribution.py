"""What is installed from the sdist's wheel works without the repository beside it."""

import configparser
import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest
from commands import QUICK, SMALL
from packaging.requirements import Requirement

import fedsafe_jax

ROOT = pathlib.Path(__file__).parents[1]


def build(kind, source, output):
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(output)!r}))"
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=True)
    return output / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the repository: building leaves files in the folder it is done in."""
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split("\n")
    copy = tmp_path_factory.mktemp("source")
    for name in filter(None, tracked):
        if (ROOT / name).is_file():
            target = copy / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    return copy


@pytest.fixture(scope="module")
def site(source, tmp_path_factory):
    """A folder with what the wheel holds."""
    folder = tmp_path_factory.mktemp("distribution")
    shutil.unpack_archive(build("sdist", source, folder), folder)
    (unpacked,) = (p for p in folder.glob("fedsafe_jax-*") if p.is_dir())
    with zipfile.ZipFile(build("wheel", unpacked, folder)) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_demos_base_is_evaluated_in_an_empty_folder(site, tmp_path):
    # PYTHONPATH comes before an editable install of the repository.
    environment = os.environ | {"PYTHONPATH": str(site), "XLA_FLAGS": QUICK}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"  # the site stays as the wheel has it
    command = [sys.executable, "-m", "fedsafe_jax.main", "--config=configs/demo.py"]
    flags = [f"--config.{s}" for s in SMALL if s.startswith("eval")] + ["--config.arms=('base',)"]
    done = subprocess.run(
        [*command, "--workdir=run", *flags],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run/report.html").is_file()
    where = [sys.executable, "-c", "import fedsafe_jax; print(fedsafe_jax.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found.stdout.startswith(str(site))


def test_the_wheel_holds_the_package_and_its_configs_alone(site):
    (info,) = site.glob("*.dist-info")
    assert {p.name for p in site.iterdir()} == {"fedsafe_jax", info.name}
    configs = {p.name for p in (ROOT / "configs").glob("*.py")}
    assert {p.name for p in (site / "fedsafe_jax/configs").iterdir()} == configs
    assert (info / "licenses/LICENSE").is_file()
    assert (site / "fedsafe_jax/py.typed").is_file()
    assert "fedsafe = fedsafe_jax.cli.startup:main" in (info / "entry_points.txt").read_text()
    assert f"\nVersion: {fedsafe_jax.__version__}\n" in (info / "METADATA").read_text()
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {fedsafe_jax.__version__}\n" in citation


def test_type_checkers_can_follow_an_editable_install(source, tmp_path):
    with zipfile.ZipFile(build("editable", source, tmp_path)) as archive:
        top = [name for name in archive.namelist() if ".dist-info/" not in name]
        assert len(top) == 1 and top[0].endswith(".pth")  # no import hook, which they cannot read
        assert archive.read(top[0]).decode().strip() == str(source)


def requirements():
    """Yields `(extra, Requirement)` of setup.cfg; the extra is "" for what is always installed."""
    cfg = configparser.ConfigParser()
    cfg.read(ROOT / "setup.cfg")
    lists = {"": cfg["options"]["install_requires"], **cfg["options.extras_require"]}
    for extra, text in lists.items():
        for line in filter(None, text.splitlines()):
            yield extra, Requirement(line)


def test_no_requirement_has_an_upper_bound_of_jax_or_its_libraries():
    for extra, asked in requirements():
        bounded = [s for s in asked.specifier if s.operator not in (">=", ">")]
        # cuDNN's bound is the plugin's own: jax is built against one of its major versions.
        assert not bounded or asked.name == "nvidia-cudnn-cu12", f"{extra}: {asked}"


def test_accelerators_come_in_the_versions_that_jax_pairs_with():
    extras = {}
    for extra, asked in requirements():
        if asked.name == "jax":
            extras[extra] = asked.extras
    assert extras.pop("") == set()
    assert extras == {
        "cuda12": {"cuda12"},
        "cuda13": {"cuda13"},
        "gpu": {"cuda12"},
        "tpu": {"tpu"},
        "aot": {"tpu", "cuda12-local"},
    }
    known = set(importlib.metadata.metadata("jax").get_all("Provides-Extra"))
    assert set().union(*extras.values()) <= known


@pytest.mark.parametrize(
    ("file", "jax"), [("constraints.txt", "0.10.2"), ("constraints-newest.txt", "0.12.0.1")]
)
def test_tested_versions_are_whole_and_allowed(file, jax):
    pins = dict(line.split("==") for line in (ROOT / "launch" / file).read_text().splitlines())
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    assert pins["jax"] == pins["jaxlib"] == jax
    apart = {"parity", "cuda12", "cuda13", "gpu", "tpu", "aot"}  # not of the tests' environment
    for extra, asked in requirements():
        # `pip freeze` leaves out setuptools before Python 3.12.
        if extra not in apart and asked.name != "setuptools":
            version = pins[asked.name.lower().replace("_", "-")]
            assert asked.specifier.contains(version), f"{asked}: {version}"


@pytest.mark.parametrize(
    ("code", "file"), [(0, "launch/constraints-newest.txt"), (1, "launch/constraints.txt")]
)
def test_the_versions_follow_the_python(tmp_path, code, file):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nexit {code}\n")  # as what asks whether it is 3.12 or newer
    python.chmod(0o755)
    script = f"source launch/install.sh; constraints_of {python}; constraints_of {sys.executable}"
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    own = (
        "launch/constraints-newest.txt" if sys.version_info >= (3, 12) else "launch/constraints.txt"
    )
    assert done.stdout.split() == [file, own]


def test_a_python_that_is_missing_is_one_line():
    done = subprocess.run(
        ["bash", "-c", "source launch/install.sh; python_of 3.99"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "error: no Python 3.99 on PATH or of pyenv\n"
