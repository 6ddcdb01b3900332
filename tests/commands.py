"""Runs `fedsafe_jax.main` at the smallest size that still does everything."""

import json
import multiprocessing
import multiprocessing.forkserver
import os
import pathlib
import runpy
import sys
import tempfile

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
# For tests that read no answers: to compile the programs that write them takes longer than a run.
NO_ANSWERS = "eval.tasks=('utility',)"


def command(workdir, *settings):
    # The last word on a field counts: absl would join a tuple given twice.
    fields = dict(s.split("=", 1) for s in (*SMALL, *settings))
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    start = [sys.executable, "-m", "fedsafe_jax.main", "--config=configs/demo.py"]
    return [*start, f"--workdir={workdir}", *flags]


def forkserver():
    """A context whose processes begin with what `preloaded` has imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    before = os.environ.get("PYTHONPATH")
    # The server has no `sys.path` of ours, and says nothing where it finds no module.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT / "tests"), before)))
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
    return context


class Run:
    """A process of `fedsafe_jax.main`, in the manner of `subprocess.Popen`.

    It begins as the copy of one that has imported the libraries: importing takes longer than much
    of what is tested here.
    """

    def __init__(self, workdir, *settings):
        self._folder = tempfile.TemporaryDirectory()
        self._logs = [pathlib.Path(self._folder.name, name) for name in ("stdout", "stderr")]
        context = forkserver()
        arguments = command(workdir, *settings)[3:], dict(ENVIRONMENT), self._logs
        self._process = context.Process(target=_main, args=arguments, daemon=True)
        self._process.start()
        self.kill = self._process.kill

    def poll(self):
        return self._process.exitcode

    returncode = property(poll)

    def send_signal(self, how):
        os.kill(self._process.pid, how)

    def communicate(self, timeout):
        self._process.join(timeout)
        assert self.returncode is not None, f"not done after {timeout} s"
        self.stdout, self.stderr = (log.read_text() for log in self._logs)
        return self.stdout, self.stderr


def _main(flags, environment, logs):
    for number, log in enumerate(logs, 1):
        os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
    os.environ.clear()
    os.environ |= environment
    os.chdir(ROOT)
    sys.argv = ["fedsafe_jax.main", *flags]
    runpy.run_module("fedsafe_jax.main", run_name="__main__")


def run(workdir, *settings, check=True):
    """A run to its end."""
    done = Run(workdir, *settings)
    done.communicate(600)
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done


def comparable(workdir):
    results = json.loads((workdir / "results.json").read_text())
    del results["seconds"], results["made_by"]  # time, and the command of this process
    return results


def rows(workdir):
    """What `metrics.jsonl` holds."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
