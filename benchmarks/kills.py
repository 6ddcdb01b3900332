"""Kills a small run over and over, at chosen file operations and at random moments, and compares.

    python benchmarks/kills.py --folder=runs/kills [--kills=100] [--seed=0]

Each chain is one run: killed with SIGKILL, gone on with by the same command, killed at a later
operation, and so on to its end. Then results.json, metrics.jsonl, the ledger, outcomes, what CAI
recorded and every file of the export must be those of a run that nobody disturbed, to the bit, but
for seconds. A process that ends by itself before its end must say why in one line. `kills.json` in
the folder is written after each chain; the same command goes on after the last one.

Chosen moments are those before each operation of Python on a file of the workdir (audit events:
opening to write, rename, link, mkdir, rmdir, remove, chmod), and each fsync: there the file is
cut to its half first, as by a kill in the middle of its writing. A kill before an operation
is one after the operation before. Writes of native code (tensors of checkpoints, safetensors) are
met at random moments.
"""

import argparse
import collections
import json
import math
import multiprocessing
import os
import pathlib
import random
import re
import runpy
import shutil
import signal
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
PER_CHAIN = 6
RANDOM_PER_CHAIN = 2
SETTINGS = (
    "rounds=2", "num_clients=4", "clients_per_round=2", "examples_per_client=20", "local_steps=2",
    "batch_size=2", "seq_len=64", "filter.epochs=1", "filter.max_length=32",
    "eval.max_prompts=4", "eval.max_heldout=4",
    "eval.max_new_tokens=4", "eval.batch_size=4", "cai.red_team_prompts=2", "cai.benign_prompts=1",
    "cai.steps=2", "cai.batch_size=2", "cai.pairs_per_step=1", "cai.replay_examples=4",
    "cai.max_new_tokens=8", "arms=('base','fl+filter+cai')", "keep_updates=True", "seeds=(0,)",
    "date=2026-01-01",
)  # fmt: skip
OPERATIONS = "os.rename os.remove os.mkdir os.rmdir os.link os.chmod".split()
PHASES = (  # of an operation, by the first part of the name that matches
    ("start", r"^\.?(owner|config|inputs)\.json|^ "),
    ("scores", r"filter_scores"),
    ("updates", r"updates"),
    ("checkpoint", r"checkpoints"),
    ("cai", r"cai"),
    ("records", r"metrics\.jsonl|ledger\.jsonl"),
    ("evaluation", r"arms"),
    ("report", r"report\.html|figures|tensorboard"),
    ("results", r"results|table"),
    ("export", r"export"),
)


def phase_of(name: str) -> str:
    """Returns the phase of a run to which an operation on a file belongs."""
    return next((phase for phase, pattern in PHASES if re.search(pattern, name)), "other")


def watch(workdir: pathlib.Path, target: str, log: str) -> None:
    """Kills this process at the operation `target`, or writes all operations to a log."""
    file, pid, counts = open(log, "a") if log else None, os.getpid(), collections.Counter()
    prefix = str(workdir.resolve())

    def reach(kind: str, path: object) -> bool:
        if not isinstance(path, str | os.PathLike) or os.getpid() != pid:
            return False
        path = os.path.abspath(os.fsdecode(path))
        if not path.startswith(prefix):
            return False
        name = re.sub(r"(?<=\.)[a-z0-9_]{8}(?=\.tmp)|(?<=owner\.json\.)\w+", "*", path)
        name = re.sub(r"\d{8,}", "*", name[len(prefix) :].lstrip("/"))
        counts[kind, name] += 1
        operation = f"{kind} {name} {counts[kind, name]}"
        if file:
            file.write(operation + "\n")
            file.flush()
        return operation == target

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            writes = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if writes and reach("open", arguments[0]):
                os.kill(pid, signal.SIGKILL)
        elif event in OPERATIONS and reach(event, arguments[0]):
            os.kill(pid, signal.SIGKILL)

    sync = os.fsync

    def halve(descriptor: int) -> None:
        if reach("half", os.readlink(f"/proc/self/fd/{descriptor}")):
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if os.path.isfile(path):
                os.truncate(path, os.path.getsize(path) // 2)
            os.kill(pid, signal.SIGKILL)
        sync(descriptor)

    os.fsync = halve
    sys.addaudithook(hook)


def _child(workdir: str, target: str, log: str, stderr: str) -> None:
    """Runs the command in a process that has imported the libraries."""
    for number in (1, 2):
        os.dup2(os.open(stderr, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
    os.chdir(ROOT)
    flags = [f"--config.{setting}" for setting in SETTINGS]
    sys.argv = ["fedsafe_jax.main", "--config=configs/demo.py", f"--workdir={workdir}", *flags]
    if target or log:
        watch(pathlib.Path(workdir), target, log)
    runpy.run_module("fedsafe_jax.main", run_name="__main__")


def run(workdir: pathlib.Path, target: str = "", after: float = 0.0, log: str = "") -> dict:
    """Runs the command to its end, or to its death.

    Args:
      workdir: folder of the run.
      target: the operation at which the process kills itself; "" for none.
      after: seconds after which it is killed; 0 for never.
      log: file that receives the operations.

    Returns:
      `ended`: "killed", "done" or "failed"; `seconds`, and what was `said` on stderr.
    """
    stderr = workdir.with_suffix(".stderr")
    stderr.unlink(missing_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fedsafe_jax.experiment"])
    process = context.Process(target=_child, args=(str(workdir), target, log, str(stderr)))
    started = time.monotonic()
    process.start()
    process.join(after or 900)
    if process.exitcode is None:
        process.kill()
        process.join()
    code = process.exitcode
    ended = {0: "done", -signal.SIGKILL: "killed"}.get(code, "failed")
    said = stderr.read_text() if stderr.exists() else ""
    return {"ended": ended, "code": code, "seconds": time.monotonic() - started, "said": said}


def _without_seconds(content: object) -> object:
    """Returns JSON content without what a clock measured."""
    if isinstance(content, dict):
        timed = ("seconds", "tokens_per_second")
        return {k: _without_seconds(v) for k, v in content.items() if k not in timed}
    return [_without_seconds(x) for x in content] if isinstance(content, list) else content


def outcome(workdir: pathlib.Path) -> dict[str, object]:
    """Returns what must be the same, by file."""
    files = {}
    for path in sorted(workdir.rglob("*")):
        name = path.relative_to(workdir).as_posix()
        if not path.is_file() or not re.match(
            r"results\.json|metrics\.jsonl|ledger\.jsonl|arms/|cai/|export/|updates/|filter_scores/",
            name,
        ):
            continue
        content = path.read_bytes()
        if name.endswith((".json", ".jsonl")) and not name.startswith("export/"):
            lines = [content] if name.endswith(".json") else content.splitlines()
            files[name] = [_without_seconds(json.loads(line)) for line in lines]
        else:
            files[name] = content
    return files


def differences(one: dict, other: dict) -> list[str]:
    """Returns the names of the files that differ, or that one of the two has alone."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def plan(operations: list[str], chain: int, seed: int) -> list[str | None]:
    """Returns the deaths of a chain in order: an operation each, or None for a random moment.

    Chains take turns, so that together they meet operations evenly spread over the run.
    """
    chosen = PER_CHAIN - RANDOM_PER_CHAIN
    rng = random.Random(f"{seed} {chain}")
    step = len(operations) / chosen
    places = sorted(int(step * (i + rng.random())) for i in range(chosen))
    deaths: list[str | None] = [operations[place] for place in places]
    for _ in range(RANDOM_PER_CHAIN):
        deaths.insert(rng.randrange(len(deaths) + 1), None)
    return deaths


def run_chain(folder: pathlib.Path, chain: int, seed: int, straight: dict) -> dict:
    """Kills one run over and over; returns the deaths and how it ended."""
    workdir, rng = folder / f"chain{chain}", random.Random(f"{seed} {chain} moments")
    shutil.rmtree(workdir, ignore_errors=True)
    deaths, lines, faults = [], [], []
    for target in plan(straight["operations"], chain, seed):
        print(target or "a random moment", flush=True)
        after = 0.0 if target else rng.uniform(0.2, straight["seconds"] / 2)
        done = run(workdir, target or "", after)
        if done["ended"] == "killed":
            phase = phase_of(target.split(" ", 1)[1]) if target else "random"
            deaths.append({"phase": phase, "at": target or f"{after:.2f} s"})
        elif done["ended"] == "failed":
            lines.append(done["said"].strip().splitlines()[-1:])
            if "Traceback" in done["said"]:
                faults.append(done["said"][-3000:])
        if "WARNING" in done["said"]:
            lines.append([x for x in done["said"].splitlines() if "WARNING" in x][:3])
    end = run(workdir)
    if end["ended"] != "done":
        faults.append(end["said"][-3000:])
    differ = differences(outcome(workdir), outcome(folder / "straight"))
    left = [p.relative_to(workdir).as_posix() for p in workdir.rglob("*.tmp*")]
    if not differ and not faults:
        shutil.rmtree(workdir)
    return {"deaths": deaths, "lines": lines, "faults": faults, "differ": differ, "left": left}


def main() -> None:
    """Runs what is left of the chains, and prints the count."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--chains", type=int, default=0, help="ends after so many; 0: never")
    parser.add_argument("--seed", type=int, default=0)
    values = parser.parse_args()
    folder, record = values.folder.resolve(), values.folder.resolve() / "kills.json"
    folder.mkdir(parents=True, exist_ok=True)
    known = json.loads(record.read_text()) if record.exists() else {"chains": []}
    if "straight" not in known:
        for _ in range(2):  # the first one compiles
            shutil.rmtree(folder / "straight", ignore_errors=True)
            log = folder / "operations"
            log.unlink(missing_ok=True)
            done = run(folder / "straight", log=str(log))
            if done["ended"] != "done":
                sys.exit(done["said"])
        known["straight"] = {"operations": log.read_text().splitlines()}
        known["straight"]["seconds"] = done["seconds"]
        record.write_text(json.dumps(known, indent=1))
    operations = known["straight"]["operations"]
    print(f"{len(operations)} operations, {known['straight']['seconds']:.1f} s undisturbed")
    until = len(known["chains"]) + values.chains if values.chains else math.inf
    while sum(len(chain["deaths"]) for chain in known["chains"]) < values.kills:
        if len(known["chains"]) >= until:
            break
        number = len(known["chains"])
        known["chains"].append(run_chain(folder, number, values.seed, known["straight"]))
        new = record.with_suffix(".new")
        new.write_text(json.dumps(known, indent=1))
        new.replace(record)
        last = known["chains"][-1]
        print(f"chain {number}: {len(last['deaths'])} deaths, differ: {last['differ']}", flush=True)
    deaths = [death for chain in known["chains"] for death in chain["deaths"]]
    print(f"{len(deaths)} SIGKILLs:", dict(collections.Counter(d["phase"] for d in deaths)))
    print("files that differ:", sorted({x for c in known["chains"] for x in c["differ"]}) or "none")
    print("tracebacks:", sum(len(chain["faults"]) for chain in known["chains"]))
    if any(chain["differ"] or chain["faults"] for chain in known["chains"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
