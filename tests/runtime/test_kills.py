"""A run's files are killed at each operation on them, and the same bits come out.

`benchmarks/kills.py` does the same to whole runs; here only files are written, so that kinds of
operation are met that are rare there.
"""

import importlib.util
import os
import pathlib
import signal

import numpy as np
from commands import forkserver
from etils import epath

from fedsafe_jax import own_folder, whole_files
from fedsafe_jax.models.model_files import write_json
from fedsafe_jax.models.tensor_files import save_file
from fedsafe_jax.runtime import arm_secret, fingerprints, run_files
from fedsafe_jax.runtime.client_updates import ClientUpdates
from fedsafe_jax.runtime.owner import owned

ROOT = pathlib.Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("kills", ROOT / "benchmarks" / "kills.py")
kills = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kills)

FACTORS = {"layers": {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}}


def life(workdir, target="", log=""):
    """Writes what a run of two rounds writes, in its order, going on with what is there."""
    kills.watch(workdir, target, log)
    folder = epath.Path(workdir)
    own_folder.claim_workdir(folder)
    with owned(folder):
        fingerprints.check(folder, {"constitution": "be kind"})
        run_files.claim_workdir(folder, {"rounds": 2})
        arm_secret.of_arm(folder / "checkpoints", lambda: 7)
        for t in range(2):
            updates = ClientUpdates(folder / "updates")
            updates.write_start(t + 1, FACTORS)
            updates.write(t + 1, 0, np.arange(6, dtype=np.float32), like=FACTORS)
            for name in ("cai/round_000.jsonl", "metrics.jsonl"):
                run_files.replace_lines(
                    folder / name,
                    lambda row, t=t: row["round"] >= t,
                    [{"arm": "fl", "seed": 0, "round": t, "loss": 1 / (t + 1)}],
                    fields=run_files.OF_A_ROUND,
                )
        run_files.write_json(folder / "arms" / "fl_seed0.json", {"advbench": [1, 0]})
        run_files.write_json(folder / "results.json", {"arms": {"fl": 0.5}})
        whole_files.write(folder / "report.html", b"<html></html>")
        whole_files.make_folder(folder / "export")
        save_file({"a": np.ones(1000)}, folder / "export" / "adapter_model.safetensors")
        write_json(folder / "export" / "adapter_config.json", {"r": 2})


def lived(*arguments):
    """Returns the exit code of a life in a process of its own."""
    process = forkserver().Process(target=life, args=arguments)
    process.start()
    process.join(60)
    return process.exitcode


def content(workdir):
    """Returns what every file holds; times of files alone may differ."""
    return {p.relative_to(workdir): p.read_bytes() for p in workdir.rglob("*") if p.is_file()}


def test_a_kill_at_an_operation_on_a_file_changes_nothing(tmp_path):
    straight, log = tmp_path / "straight", tmp_path / "operations"
    assert lived(straight, "", log) == 0
    wanted, operations = content(straight), log.read_text().splitlines()
    assert len(operations) > 100 and len(wanted) == 14
    # Every fourth, for the time: all of them passed as well.
    for i, operation in enumerate(operations[::4]):
        workdir = tmp_path / str(i)
        assert lived(workdir, operation) == -signal.SIGKILL, operation
        assert lived(workdir) == 0, operation
        assert content(workdir) == wanted, operation
        assert not list(workdir.rglob("*.damaged*")), operation
    assert all(os.stat(p).st_mode & 0o022 == 0 for p in tmp_path.rglob("*"))
