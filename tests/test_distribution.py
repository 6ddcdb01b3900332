"""What is installed from the sdist's wheel works without the repository beside it."""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest
from commands import QUICK, SMALL

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
