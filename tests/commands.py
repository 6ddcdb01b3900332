"""Runs `fedsafe_jax.main` at the smallest size that still does everything."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
# Devices as a user has them; compiled quickly, as in conftest.
QUICK = os.environ["XLA_FLAGS"].split(" ", 1)[1]
ENVIRONMENT = os.environ | {"XLA_FLAGS": QUICK, "TRANSFORMERS_VERBOSITY": "error"}
SMALL = (
    "rounds=3", "num_clients=4", "clients_per_round=2", "examples_per_client=20", "local_steps=2",
    "batch_size=2", "seq_len=64", "filter.epochs=1", "filter.max_length=32",
    "eval.max_prompts=4", "eval.max_heldout=4", "eval.max_new_tokens=4", "eval.batch_size=4",
    "cai.red_team_prompts=2", "cai.benign_prompts=1", "cai.steps=2",
    "cai.batch_size=2", "cai.pairs_per_step=1", "cai.replay_examples=4",
    "cai.max_new_tokens=8", "arms=('base','fl','fl+filter+cai')",
)  # fmt: skip


def command(workdir, *settings):
    # The last word on a field counts: absl would join a tuple given twice.
    fields = dict(s.split("=", 1) for s in (*SMALL, *settings))
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    start = [sys.executable, "-m", "fedsafe_jax.main", "--config=configs/demo.py"]
    return [*start, f"--workdir={workdir}", *flags]


def run(workdir, *settings, check=True):
    done = subprocess.run(
        command(workdir, *settings),
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done


def comparable(workdir):
    results = json.loads((workdir / "results.json").read_text())
    del results["seconds"]
    return results


def start(workdir, *settings):
    """The run as a process, for tests that end it."""
    return subprocess.Popen(
        command(workdir, *settings), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def rows(workdir):
    """What `metrics.jsonl` holds."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
