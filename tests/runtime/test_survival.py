"""Runs that are killed over and over, or terminated: they end with the same adapter."""

import os
import random
import signal
import time

from commands import NO_ANSWERS, Run, comparable, run

KILLS = int(os.environ.get("FEDSAFE_KILLS", "2"))
ROUNDS = KILLS + 4

LONG = (
    "arms=('fl',)",
    NO_ANSWERS,
    f"rounds={ROUNDS}",
    "export_arm=fl",
    "filter.epochs=0",
    "federated.compression=int8",
    "checkpoint_keep=3",
    "keep_updates=True",
)


def adapter_bytes(workdir):
    return (workdir / "export" / "adapter" / "adapter_model.safetensors").read_bytes()


def updates(workdir):
    """What clients sent in the kept rounds, by file."""
    folder = workdir / "updates"
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def checkpoints(workdir):
    folder = workdir / "checkpoints" / "fl" / "seed0"
    return list(folder.iterdir()) if folder.is_dir() else []


def reached(workdir, before, writing):
    """Whether a checkpoint is being written, or a round was finished, that was not there before."""
    new = {p.name for p in checkpoints(workdir)} - before
    return any("tmp" in name if writing else name.isdigit() for name in new)


def test_kills_end_with_the_same_adapter(tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run(straight, *LONG)
    rng = random.Random(0)
    written_to = 0
    for kill in range(KILLS):
        process, before = Run(killed, *LONG), {p.name for p in checkpoints(killed)}
        deadline = time.monotonic() + 120
        while process.poll() is None and not reached(killed, before, kill % 2):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        if not kill % 2:
            time.sleep(rng.uniform(0, 0.5))
        written_to += any("tmp" in p.name for p in checkpoints(killed))
        process.kill()
        process.communicate(timeout=60)
    assert written_to >= 3 * KILLS // 10
    assert "[100%] fl seed 0: evaluating" in run(killed, *LONG).stderr  # counts what was found
    assert adapter_bytes(killed) == adapter_bytes(straight)
    assert comparable(killed) == comparable(straight)
    assert updates(killed) == updates(straight)
    names = {path.split("/")[2] for path in updates(straight)}
    kept = {f"round_{n}" for n in range(ROUNDS - 2, ROUNDS + 1)}
    assert names == kept == {f"round_{p.name}" for p in checkpoints(straight)}


def test_sigterm_loses_no_finished_round(tmp_path):
    settings = (*LONG, "checkpoint_every=100")
    process, metrics = Run(tmp_path, *settings), tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    assert not [p for p in checkpoints(tmp_path) if p.name.isdigit()]
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "the same command continues" in errors and "Traceback" not in errors
    done = len(metrics.read_text().splitlines())
    assert [p.name for p in checkpoints(tmp_path)] == [str(done)]
