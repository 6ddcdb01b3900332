"""From a fresh machine to the first result, step by step.

    python benchmarks/startup.py --steps=import,cold,warm
    python benchmarks/startup.py --steps=venv,install,import,cold,warm [--extras=report]

`venv` and `install` make an environment in a temporary folder, with the tested versions, which the
other steps then use instead of this interpreter; nothing is read from pip's cache. `import` is the
median of five processes. `cold` and `warm` are whole runs of `configs/demo.py`, the first without
any compiled program, the second with those of the first: seconds until the first line, until the
first round is done, and in all, and how many of these JAX spends on tracing, lowering, compiling
and reading compiled programs. The last line is a JSON object.
"""

import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import jax
from absl import app, flags
from rich.console import Console
from rich.table import Table

STEPS = ("venv", "install", "import", "cold", "warm")
_STEPS = flags.DEFINE_list("steps", ["import", "cold", "warm"], f"Some of {', '.join(STEPS)}.")
_EXTRAS = flags.DEFINE_string("extras", "report", "Of the package, to install.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Of the import.")

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Runs main, and writes down how long JAX prepared programs.
TIMED = """
import json, runpy, sys
import jax
seconds = {}
def note(event, duration, **_):
    if "/compile/" in event or "cache_retrieval" in event:
        name = event.rsplit("/", 1)[1]
        seconds[name] = seconds.get(name, 0) + duration
jax.monitoring.register_event_duration_secs_listener(note)
target = sys.argv.pop(1)
try:
    runpy.run_module("fedsafe_jax.main", run_name="__main__", alter_sys=True)
finally:
    json.dump(seconds, open(target, "w"))
"""


def timed(command, **options) -> float:
    """Seconds of a command; what it says is shown if it fails."""
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command[:4]))} ...\n{done.stderr[-3000:]}")
    return time.monotonic() - started


def run_demo(python, folder: pathlib.Path, name: str) -> dict:
    """A run of the demo, with compiled programs kept in `folder`."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",  # as where a run keeps its own
    }
    environment.pop("XLA_FLAGS", None)
    preparing = folder / f"{name}.json"
    flags_given = ["--config=configs/demo.py", f"--workdir={folder / name}"]
    command = [str(python), "-c", TIMED, str(preparing), *flags_given]
    started, said, reached = time.monotonic(), [], {}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    for line in process.stderr:
        said.append(line)
        reached.setdefault("first line", time.monotonic() - started)
        if " round 1 " in line:
            reached.setdefault("first round", time.monotonic() - started)
    if process.wait():
        raise SystemExit("".join(said)[-3000:])
    whole = time.monotonic() - started
    parts = json.loads(preparing.read_text())
    return {"all": whole, **reached, "preparing": sum(parts.values()), "preparing_parts": parts}


def main(argv):
    del argv
    if unknown := sorted(set(_STEPS.value) - set(STEPS)):
        raise SystemExit(f"--steps: {unknown[0]} is not one of {', '.join(STEPS)}.")
    folder, python = pathlib.Path(tempfile.mkdtemp()), pathlib.Path(sys.executable)
    found: dict = {}
    try:
        if "venv" in _STEPS.value or "install" in _STEPS.value:
            found["venv"] = timed([python, "-m", "venv", folder / "venv"])
            python = folder / "venv" / "bin" / "python"
        if "install" in _STEPS.value:
            constraints = ROOT / "launch" / "constraints.txt"
            found["install"] = timed(
                [python, "-m", "pip", "install", "--quiet", "--no-cache-dir", "--constraint",
                 constraints, f"{ROOT}[{_EXTRAS.value}]"],
            )  # fmt: skip
        if "import" in _STEPS.value:
            each = [timed([python, "-c", "import fedsafe_jax"]) for _ in range(_REPEATS.value + 1)]
            found["import"], found["first import"] = statistics.median(each[1:]), each[0]
        for name in ("cold", "warm"):
            if name in _STEPS.value:
                found[name] = run_demo(python, folder, name)
    finally:
        shutil.rmtree(folder)
    table = Table(title="Seconds", title_justify="left")
    for name in ("step", "all", "first line", "first round", "preparing programs"):
        table.add_column(name, justify="left" if name == "step" else "right")
    for name, value in found.items():
        parts = value if isinstance(value, dict) else {"all": value}
        cells = [parts.get(key) for key in ("all", "first line", "first round", "preparing")]
        table.add_row(name, *("" if c is None else f"{c:.1f}" for c in cells))
    Console(width=100).print(table)
    print(json.dumps(found | {"jax": jax.__version__, "device": str(jax.devices()[0])}))


if __name__ == "__main__":
    app.run(main)
