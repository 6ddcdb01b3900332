"""A replay that begins where an excluded client was first drawn, from the files of the first run.

Without the client all rounds before that one are the same to the bit: its slot was not drawn, and
nothing else depends on it. So they are not computed again where the first run has a checkpoint of
them (`checkpoint_keep=0` keeps all).
"""

from typing import TypeVar

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from fedsafe_jax.pipeline.ledger_lines import ArmLines
from fedsafe_jax.pipeline.workdir import ArmFiles
from fedsafe_jax.runtime import checkpoint, fingerprints, ledger, multihost, run_files
from fedsafe_jax.whole_files import WorkdirError

State = TypeVar("State")

# Fields in which a replay may differ from the run: no round depends on them.
MAY_DIFFER = {
    "federated.exclude",
    "federated.replay",
    "checkpoint_every",
    "checkpoint_keep",
    "keep_updates",
    "export_arm",
}


def check(config: ConfigDict) -> set[int]:
    """Checks that `federated.replay` is the run of this config, but for the clients excluded.

    Returns:
      The clients that this run excludes and the other did not.

    Raises:
      WorkdirError: it is not, or not the folder of a run.
      StorageError: the storage does not give its config.
    """
    source = config.federated.replay
    try:
        stored = run_files.read_config(epath.Path(source))
    except ValueError as error:
        raise WorkdirError(
            f"federated.replay={source}: config.json is damaged ({error})."
        ) from None
    if stored is None:
        raise WorkdirError(f"federated.replay={source}: no config.json; give the folder of a run.")
    changed = run_files.changed_fields(stored, config.to_dict())
    before = set(stored.get("federated", {}).get("exclude") or ())
    if back := before - set(config.federated.exclude):
        raise WorkdirError(
            f"federated.replay={source} is a run without client {min(back)}, which has a part in "
            "this one: exclude it as well, or replay another run."
        )
    for field, (old, new) in changed.items():
        if field not in MAY_DIFFER:
            raise WorkdirError(
                f"federated.replay={source} is a run with {field}={old!r}, this command has "
                f"{new!r}: a replay differs in federated.exclude alone."
            )
    return set(config.federated.exclude) - before


def take_over(
    config: ConfigDict, files: ArmFiles, lines: ArmLines, first: State
) -> tuple[State, int]:
    """Copies the records of the rounds before an excluded client was drawn, and reads their state.

    All processes call this. A kill in the middle leaves records of rounds without a checkpoint,
    which the next start replaces.

    Args:
      config: config of the run.
      files: files of the arm and seed.
      lines: its lines of the ledger.
      first: `FederatedState` before the first round, for its structure.

    Returns:
      `(state, rounds)` of the newest checkpoint of the other run that is before that round, of
      numpy arrays; `(first, 0)` without any.

    Raises:
      WorkdirError: the other run is not the same, or its files do not match its ledger.
      StorageError: its checkpoint cannot be read.
    """
    original = files._replace(workdir=epath.Path(config.federated.replay))
    done = multihost.first(lambda: _copy_records(config, original, files=files, lines=lines))
    done = int(multihost.broadcast(np.int64(done or 0)))
    if not done:
        return first, 0
    read = multihost.first(lambda: checkpoint.read_factors(original.checkpoints, done, first))
    if read is None:
        read = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), first)
    return multihost.broadcast(read), done


def _copy_records(config: ConfigDict, original: ArmFiles, files: ArmFiles, lines: ArmLines) -> int:
    """Copies rows of metrics, records of CAI and lines of the ledger; returns how many rounds."""
    if files.planned.arm.training == "centralised":
        return 0  # the client's pairs are in every round
    unlearned = check(config)
    theirs, ours = map(fingerprints.hashes, (original.workdir, files.workdir))
    if changed := sorted(k for k in theirs.keys() | ours if theirs.get(k) != ours.get(k)):
        raise WorkdirError(
            f"federated.replay={original.workdir} began with another {changed[0]} "
            f"({len(changed)} file(s) differ): give this run the files that one began with."
        )
    rows = run_files.read_lines(original.workdir / "metrics.jsonl", run_files.OF_A_ROUND)
    rows = [row for row in rows if files.is_mine(row)]
    before = next((i for i, row in enumerate(rows) if unlearned & _drawn(row)), len(rows))
    kept = [done for done in checkpoint.rounds_of(original.checkpoints) if done <= before]
    if not kept:
        return 0
    done = kept[-1]
    chain = [row for row in ledger.read(original.workdir) if files.is_mine(row)][:done]
    problem = next(ledger.faults(chain), "" if len(chain) == done else "it is cut off")
    if problem:
        raise WorkdirError(f"{original.workdir / ledger.NAME}: {problem}; see `fedsafe verify`.")
    lines.go_on(0, chain[0]["before"])
    for row, line in zip(rows[:done], chain, strict=True):
        t = row["round"]
        row = {name: value for name, value in row.items() if name != ledger.KEY}
        row = {"unlearned": []} | row if "clients" in row else row
        name = run_files.cai_name(t)
        records = run_files.read_lines(original.workdir / "cai" / name, run_files.OF_A_ROUND)
        mine = [record for record in records if files.is_mine(record)]
        files.record(lines.repeat(row, line), mine)
    return done


def _drawn(row: dict) -> set[int]:
    """Returns the clients that were drawn in a round, whether or not they answered."""
    return {i for name in ("clients", "no_data", "dropped_out") for i in row.get(name, ())}
