"""`benchmarks/device.sh` at its tiny size, on the CPU."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def device(*arguments):
    return subprocess.run(
        ["bash", ROOT / "benchmarks" / "device.sh", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"},
    )


def test_a_part_is_measured_and_written(tmp_path):
    done = device("--tiny", f"--output={tmp_path}", "attention")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "attention.json").read_text())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["attention.json", "attention.log"]
    # bfloat16 has eight bits: a rounding is 2 ** -9 of a number, half of it on average.
    assert all(0 < error < 2**-8 for error in results["xla: error"])
    assert results["tiny: xla"]["ms"] > 0


def test_an_unknown_part_or_option_is_one_line(tmp_path):
    for wrong, found in (("speed", "speed is no part; parts are"), ("--fast", "--fast is no")):
        done = device(wrong, f"--output={tmp_path}")
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1 and found in done.stderr
