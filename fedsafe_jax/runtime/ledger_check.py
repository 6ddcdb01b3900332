"""Checks of a workdir against its ledger: what was changed, cut off or taken away since.

Every file is only read. What a round learned from is not in the folder, so the hashes of clients'
pairs are compared with each other alone, and with those of another run by whoever has it.
"""

import json
from collections.abc import Iterator
from typing import NamedTuple

from etils import epath

from fedsafe_jax import whole_files
from fedsafe_jax.runtime import checkpoint, fingerprints, ledger, run_files
from fedsafe_jax.runtime.client_updates import ClientUpdates
from fedsafe_jax.whole_files import WorkdirError

AdapterHashes = dict[tuple[str, int, int], str]


class Chain(NamedTuple):
    """The lines of one arm and seed, by what they are of.

    Attributes:
      arm, seed: which it is.
      rounds: lines of rounds.
      outcome: line of the outcomes, {} before there are any.
      export: line of the export, {} of an arm that is not exported.
    """

    arm: str
    seed: int
    rounds: list[dict]
    outcome: dict
    export: dict

    @property
    def name(self) -> str:
        """The arm and seed as messages name them."""
        return f"{self.arm} seed {self.seed}"


def chains(rows: list[dict]) -> list[Chain]:
    """Returns the chains of a ledger's lines, in the order in which they begin."""
    known = []
    for (arm, seed), lines in ledger.by_arm(rows).items():
        of_rounds = [row for row in lines if "metrics" in row]
        outcome = next((row for row in lines if "outcome" in row), {})
        export = next((row for row in lines if "export" in row), {})
        known.append(Chain(arm, seed, rounds=of_rounds, outcome=outcome, export=export))
    return known


def read(workdir: epath.Path) -> tuple[list[dict], list[str]]:
    """Reads the ledger, whatever its lines hold.

    Returns:
      `(lines, what is wrong with others)`.

    Raises:
      WorkdirError: there is none.
      StorageError: the storage does not give it.
    """
    content = whole_files.read(workdir / ledger.NAME)
    if content is None:
        raise WorkdirError(
            f"{workdir / ledger.NAME}: not there; give the folder of a run, which writes it from "
            "its first round on."
        )
    rows, wrong = _rows(content, ledger.NAME)
    for row in rows:
        if not ledger.is_whole(row):
            wrong.append(
                f"{ledger.NAME}: {row['arm']} seed {row['seed']}: line of round {row['round']}: "
                "damaged"
            )
    return list(filter(ledger.is_whole, rows)), wrong


def findings(workdir: epath.Path, rows: list[dict]) -> Iterator[str]:
    """Yields what does not match in the files of a run, one line each.

    Args:
      workdir: folder of the run.
      rows: lines of its ledger, from `read`.

    Raises:
      StorageError: the storage does not give a file.
    """
    for (arm, seed), lines in ledger.by_arm(rows).items():
        yield from (f"{ledger.NAME}: {arm} seed {seed}: {said}" for said in ledger.faults(lines))
    known = chains(rows)
    yield from _of_run(workdir, rows)
    yield from _of_metrics(workdir, known)
    for chain in known:
        yield from _of_records(workdir, chain)
        yield from _of_updates(workdir, chain)
        yield from _of_outcome(workdir, chain)
        yield from _of_checkpoints(workdir, chain)
    yield from _of_results(workdir, rows, known)
    yield from _of_export(workdir, known)


def _rows(content: bytes, name: str) -> tuple[list[dict], list[str]]:
    """Returns the rows of a file of JSON lines, and what is wrong with other lines."""
    rows, wrong = [], []
    lines = content.split(b"\n")
    if lines.pop():
        wrong.append(f"{name}: its last line is cut off")
    for number, line in enumerate(lines, 1):
        try:
            (row,), _ = whole_files.parse_lines(line + b"\n", name, run_files.OF_A_ROUND)
            if whole_files.to_json(row) != line:
                raise ValueError("not as it was written")
            rows.append(row)
        except (WorkdirError, ValueError):
            wrong.append(f"{name} line {number}: damaged")
    return rows, wrong


def _json(path: epath.Path, name: str) -> tuple[dict | None, list[str]]:
    """Returns what a JSON file holds, None where there is none, and what is wrong with it."""
    content = whole_files.read(path)
    if content is None:
        return None, []
    try:
        held = json.loads(content.decode("utf-8"))
        if not isinstance(held, dict):
            raise ValueError("no object")
    except (ValueError, RecursionError):
        return {}, [f"{name}: damaged"]
    if whole_files.to_json(held, indent=1) + b"\n" != content:
        return held, [f"{name}: not as it was written"]
    return held, []


def _of_run(workdir: epath.Path, rows: list[dict]) -> Iterator[str]:
    """Compares config and hashes of inputs with those that each line names."""
    config, wrong = _json(workdir / "config.json", "config.json")
    yield from wrong
    inputs, wrong = _json(workdir / fingerprints.NAME, fingerprints.NAME)
    yield from wrong
    entries = (inputs or {}).items()
    hashes = {k: e["sha256"] for k, e in entries if isinstance(e, dict) and "sha256" in e}
    here = {"config": ledger.of_json(config or {}), "inputs": ledger.of_json(hashes)}
    for name, file in (("config", "config.json"), ("inputs", fingerprints.NAME)):
        other = [row for row in rows if name in row and row[name] != here[name]]
        if other:
            where = f"{other[0]['arm']} seed {other[0]['seed']} round {other[0]['round']}"
            yield f"{file}: {len(other)} line(s) name another one, the first of {where}"


def _of_metrics(workdir: epath.Path, known: list[Chain]) -> Iterator[str]:
    """Compares each row of metrics with the line that it names, and that names it."""
    name = "metrics.jsonl"
    metrics, wrong = _rows(whole_files.read(workdir / name) or b"", name)
    yield from wrong
    lines = {(c.arm, c.seed, row["round"]): row for c in known for row in c.rounds}
    for row in metrics:
        place = (row["arm"], row["seed"], row["round"])
        where = f"{place[0]} seed {place[1]} round {place[2]}"
        line = lines.pop(place, None)
        if line is None:
            yield f"{ledger.NAME}: no line of {where}, of which {name} has a row"
            continue
        if row.get(ledger.KEY) != ledger.line_hash(line):
            yield f"{ledger.NAME}: the line of {where} is not the one that {name} names"
        if ledger.of_json({k: v for k, v in row.items() if k != ledger.KEY}) != line["metrics"]:
            yield f"{name}: the row of {where} has changed"
    for arm, seed, round_number in lines:
        yield f"{name}: no row of {arm} seed {seed} round {round_number}"


def _of_records(workdir: epath.Path, chain: Chain) -> Iterator[str]:
    """Compares the records of Constitutional AI."""
    for line in chain.rounds:
        if "cai" not in line:
            continue
        name = f"cai/{run_files.cai_name(line['round'])}"
        records, wrong = _rows(whole_files.read(workdir / name) or b"", name)
        yield from wrong
        mine = [row for row in records if (row["arm"], row["seed"]) == (chain.arm, chain.seed)]
        if ledger.of_bytes(whole_files.to_json_lines(mine)) != line["cai"]:
            yield f"{name}: the records of {chain.name} have changed"


def _of_updates(workdir: epath.Path, chain: Chain) -> Iterator[str]:
    """Compares the updates that are kept."""
    folder = run_files.arm_folder(
        workdir, "updates", run_files.file_name(chain.arm), seed=chain.seed
    )
    updates = ClientUpdates(folder)
    kept = set(updates.rounds())
    for line in chain.rounds:
        done = line["round"] + 1
        if done not in kept:
            continue
        here, then = updates.hashes(done), line.get("updates", {})
        for client in sorted(here.keys() | then.keys()):
            if here.get(client) != then.get(client):
                what = "start" if client == "start" else f"the update of client {client}"
                yield f"updates: {chain.name} round {done}: {what} has changed, or is gone"


def _of_outcome(workdir: epath.Path, chain: Chain) -> Iterator[str]:
    """Compares the outcomes of an arm, and the adapter that they say they are of."""
    path = run_files.outcome_file(workdir, run_files.file_name(chain.arm), chain.seed)
    name = f"arms/{path.name}"
    outcome, wrong = _json(path, name)
    yield from wrong
    if outcome is None and chain.outcome:
        yield f"{name}: not there, or the run was stopped as it was written"
    elif outcome is not None and not chain.outcome:
        yield f"{ledger.NAME}: no line of {name}"
    elif outcome is not None:
        if ledger.of_json(outcome) != chain.outcome["outcome"]:
            yield f"{name}: has changed"
        last = chain.rounds[-1].get("after") if chain.rounds else None
        if outcome.get("adapter_sha256") != last:
            yield f"{name}: is of another adapter than the last round gave"


def _of_checkpoints(workdir: epath.Path, chain: Chain) -> Iterator[str]:
    """Says which checkpoints the ledger does not reach; their content is `adapters`' to check."""
    known = {line["round"] for line in chain.rounds}
    for done in _checkpoints(workdir, chain):
        if done - 1 not in known:
            where = f"round {done - 1}, whose checkpoint is there"
            yield f"{ledger.NAME}: {chain.name} has no line of {where}"


def _checkpoints(workdir: epath.Path, chain: Chain) -> list[int]:
    folder = run_files.arm_folder(
        workdir, "checkpoints", run_files.file_name(chain.arm), seed=chain.seed
    )
    return checkpoint.rounds_of(folder)


def checkpoints(workdir: epath.Path, rows: list[dict]) -> list[tuple[Chain, int, str]]:
    """Returns `(chain, rounds done, hash of its adapter)` of each checkpoint that has a line."""
    covered = []
    for chain in chains(rows):
        given = {line["round"] + 1: line.get("after", "") for line in chain.rounds}
        kept = _checkpoints(workdir, chain)
        covered += [(chain, done, given[done]) for done in kept if done in given]
    return covered


def _of_results(workdir: epath.Path, rows: list[dict], known: list[Chain]) -> Iterator[str]:
    """Compares `results.json` with itself, and the ends of the chains with those that it names."""
    name = "results.json"
    results, wrong = _json(workdir / name, name)
    yield from wrong
    if not results:
        if results is None and any(chain.export for chain in known):
            yield f"{name}: not there"
        return
    said = results.get(ledger.KEY)
    said = said if isinstance(said, dict) else {}
    if said.get("results") != ledger.of_results(results):
        yield f"{name}: has changed"
    lines = {(arm, str(seed)): chain for (arm, seed), chain in ledger.by_arm(rows).items()}
    named = ledger.named(said.get("heads"))
    if named is None:
        yield f"{name}: what it says of the ends of the ledger is damaged"
        return
    for (arm, seed), (count, end) in named.items():
        chain = lines.get((arm, seed), [])
        if len(chain) < count:
            yield (
                f"{ledger.NAME}: {arm} seed {seed} has {len(chain)} lines, {name} was written "
                f"behind {count}"
            )
        elif ledger.line_hash(chain[count - 1]) != end:
            yield f"{ledger.NAME}: {arm} seed {seed} does not lead to the line that {name} names"
    for arm, seed in sorted(lines.keys() - named.keys()):
        yield f"{name}: says nothing of {arm} seed {seed}"


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    """Yields all files below a folder; buckets know no recursive patterns."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def _of_export(workdir: epath.Path, known: list[Chain]) -> Iterator[str]:
    """Compares the exported files."""
    folder = workdir / "export"
    there = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    line = next((chain.export for chain in known if chain.export), {})
    if there and not line:
        yield f"{ledger.NAME}: no line of export/"
    for name, then in line.get("export", {}).items():
        if name not in there:
            yield f"export/{name}: not there"
        elif fingerprints.of_file(there[name]) != then:
            yield f"export/{name}: has changed"
    for name in sorted(there.keys() - line.get("export", {}).keys()) if line else ():
        yield f"export/{name}: no line of {ledger.NAME} names it"
