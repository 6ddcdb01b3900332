"""What a run with everything leaves beside its checkpoints, without a model."""

import numpy as np

from fedsafe_jax.cai.revise import Record
from fedsafe_jax.config import default_config
from fedsafe_jax.data.chat import Encoded
from fedsafe_jax.filters.actions import FilterCounts
from fedsafe_jax.pipeline import ledger_lines
from fedsafe_jax.pipeline.arms import planned_arms
from fedsafe_jax.pipeline.clients import Clients
from fedsafe_jax.pipeline.workdir import HASH, ArmFiles
from fedsafe_jax.runtime import fingerprints, ledger, ledger_check, run_files

ROUNDS, FACTORS = 3, {"a": np.arange(6, dtype=np.float32)}


def clients_of(last_token=3, flagged=True):
    """Two clients of a pair each; the second one's is flagged and kept."""
    pairs = [
        [Encoded(np.array([1, 2, t], np.int32), np.array([0, 1, 1], bool))] for t in (9, last_token)
    ]
    counts = FilterCounts(**dict.fromkeys(FilterCounts._fields, 0) | {"kept": 1})
    verdicts = [np.array([False]), np.array([flagged])]
    return Clients(pairs, pairs, [counts, counts], flagged=verdicts, threshold=0.5)


def files_of(workdir, seed=0, **changes):
    """Files and config of the arm with everything."""
    c = default_config()
    c.rounds, c.date = ROUNDS, "2026-01-01"
    c.update_from_flattened_dict(changes)
    planned = next(one for one in planned_arms(c) if one.arm.cai and one.arm.filter)
    return ArmFiles(workdir, planned, seed), c


def row_of(files, t, seconds=1.0):
    key = {"arm": files.planned.id, "seed": files.seed, "round": t}
    return key | {"loss": 1 / (t + 3), "clients": [t % 2], "seconds": {"federated": seconds}}


def record(answer):
    fields = dict.fromkeys(Record._fields, "")
    return Record(**fields | {"initial": answer})


def lived(workdir, first=0, last=ROUNDS, members=None, loss=None, seed=0, seconds=1.0):
    """Writes what rounds `first` to `last` of a run write, beside the checkpoints."""
    files, c = files_of(workdir, seed)
    fingerprints.check(workdir, {"constitution": "be kind"})
    run_files.claim_workdir(workdir, c.to_dict())
    lines = ledger_lines.ArmLines(c, members or clients_of(), files)
    lines.go_on(first, f"adapter{first}")
    for t in range(first, last):
        files.updates.write_start(t + 1, FACTORS)
        files.updates.write(t + 1, t % 2, np.arange(6, dtype=np.float32) + t, like=FACTORS)
        row = row_of(files, t, seconds) | ({} if loss is None else {"loss": loss})
        records = files.record_rows(t, [record(f"\ud800 {t}")])
        row = lines.add_round(row, records, [t % 2], f"adapter{t + 1}")
        files.record(row, records)
    if last == ROUNDS:
        outcome = {"utility": {"nll": [0.5, float("nan")]}, HASH: f"adapter{ROUNDS}"}
        outcome["seconds"] = seconds
        lines.add_outcome(ROUNDS, outcome)
        files.write_outcome(outcome)


def finished(workdir, seconds=1.0):
    """Writes a whole run of two seeds, with results and export."""
    for seed in (0, 1):
        lived(workdir, seed=seed, seconds=seconds)
    results = {"arms": {"fl": 0.25}, "seconds": {"this_process": seconds}}
    end = {"heads": ledger.heads(ledger.read(workdir)), "results": ledger.of_results(results)}
    run_files.write_json(workdir / "results.json", results | {ledger.KEY: end})
    (workdir / "export").mkdir()
    (workdir / "export" / "adapter.bin").write_bytes(b"weights")
    files, _ = files_of(workdir)
    exported = {"adapter.bin": fingerprints.of_file(workdir / "export" / "adapter.bin")}
    ledger_lines.add_export(files, ROUNDS, exported)


def findings(workdir):
    rows, wrong = ledger_check.read(workdir)
    return [*wrong, *ledger_check.findings(workdir, rows)]
