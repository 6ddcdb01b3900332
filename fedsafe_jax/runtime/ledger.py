"""The ledger of a run: what each round began with, learned from and gave, as a chain of hashes.

`ledger.jsonl` has a line for each round of each arm and seed, one for the outcomes of a finished
arm, and one for the export. Each names the hash of the line before it of the same arm and seed, so
no line can change, come or go in the middle. The end of each chain is also in `metrics.jsonl`,
whose rows name the ledger's line of their round, and in `results.json`. Nothing in it is signed:
who can write to the folder can make another ledger that holds together, so `heads` are what to keep
elsewhere.

Seconds are in no hash: two runs that did the same have the same ledger.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from etils import epath

from fedsafe_jax import whole_files
from fedsafe_jax.runtime import multihost, run_files
from fedsafe_jax.whole_files import WorkdirError

NAME = "ledger.jsonl"
KEY = "ledger"  # of the hash of a line, in metrics.jsonl, and of the heads, in results.json
FIELDS = run_files.OF_A_ROUND | {"previous": str}
# Fields that a clock, or the command that was typed, decides.
CIRCUMSTANCES = ("seconds", "tokens_per_second", "made_by")


def of_bytes(content: bytes) -> str:
    """Returns the SHA-256 of bytes, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def of_json(content: Any) -> str:
    """Returns the SHA-256 of JSON with sorted names, without `CIRCUMSTANCES`."""
    return of_bytes(whole_files.to_json(_settled(content)))


def of_results(results: dict) -> str:
    """Returns the hash of what `results.json` holds beside what it says of the ledger."""
    return of_json({name: value for name, value in results.items() if name != KEY})


def _settled(content: Any) -> Any:
    if isinstance(content, dict):
        return {k: _settled(v) for k, v in sorted(content.items()) if k not in CIRCUMSTANCES}
    return [_settled(x) for x in content] if isinstance(content, list | tuple) else content


def line_hash(row: dict) -> str:
    """Returns the hash of a line, by which the next one and other files name it."""
    return of_bytes(whole_files.to_json(row))


def is_whole(row: dict) -> bool:
    """Tells whether what a line holds by name, such as hashes by client, is there by name."""
    clients = row.get("clients", {})
    held = [clients, row.get("updates", {}), row.get("export", {})]
    held += clients.values() if isinstance(clients, dict) else ()
    return all(isinstance(one, dict) for one in held)


def read(workdir: epath.Path) -> list[dict]:
    """Returns the lines of a run's ledger, in the order of the file; [] without one.

    Raises:
      WorkdirError: a line is damaged.
      StorageError: the storage does not give it.
    """
    return run_files.read_lines(workdir / NAME, FIELDS)


def by_arm(rows: Iterable[dict]) -> dict[tuple[str, int], list[dict]]:
    """Returns the lines of each `(arm, seed)`, in the order of the file."""
    chains: dict[tuple[str, int], list[dict]] = {}
    for row in rows:
        chains.setdefault((row["arm"], row["seed"]), []).append(row)
    return chains


def heads(rows: Iterable[dict]) -> dict[str, dict[str, dict]]:
    """Returns the end of each chain, `{arm: {seed: {"lines": number, "sha256": of the last}}}`."""
    ends: dict[str, dict[str, dict]] = {}
    for (arm, seed), chain in by_arm(rows).items():
        end = {"lines": len(chain), "sha256": line_hash(chain[-1])}
        ends.setdefault(arm, {})[str(seed)] = end
    return ends


def named(heads: Any) -> dict[tuple[str, str], tuple[int, str]] | None:
    """Reads what `heads` has returned from a file.

    Returns:
      Number of lines and hash of the last one by `(arm, seed)`; None where it is damaged.
    """
    try:
        named = {
            (arm, seed): (end["lines"], end["sha256"])
            for arm, seeds in heads.items()
            for seed, end in seeds.items()
        }
    except (AttributeError, KeyError, TypeError):
        return None
    counts = [count for count, _ in named.values()]
    return named if all(isinstance(n, int) and n >= 1 for n in counts) else None


def faults(chain: list[dict]) -> Iterator[str]:
    """Yields what does not hold together in the lines of one arm and seed, a text each."""
    previous, adapter = "", None
    for number, row in enumerate(chain):
        where = f"line of round {row['round']}"
        if row["round"] != number:
            yield f"{where}: expected that of round {number}; lines are missing or out of order"
            return
        if row.get("previous") != previous:
            yield f"{where}: the line before it is not the one that it was written behind"
        if adapter is not None and row.get("before") != adapter:
            yield f"{where}: began with another adapter than the round before it gave"
        if not is_whole(row):
            yield f"{where}: damaged"
            return
        previous, adapter = line_hash(row), row.get("after")
    for what in ("pairs", "kept", "filter"):
        seen: dict[str, str] = {}
        for row in chain:
            for client, held in row.get("clients", {}).items():
                if what in held and seen.setdefault(client, held[what]) != held[what]:
                    yield f"line of round {row['round']}: {what} of client {client} have changed"


def _other_pairs(chain: Iterable[dict], held: Callable[[str], dict]) -> str:
    """Says which client holds something else than the lines of a chain say; "" for none."""
    for row in chain:
        for client, then in row.get("clients", {}).items():
            now = held(client)
            other = [what for what in then if what in now and now[what] != then[what]]
            if other:
                return (
                    f"{other[0]} of client {client} are others than in round {row['round'] + 1}, "
                    "as after a change of the data, or of the version that encodes them"
                )
    return ""


class ArmLedger:
    """The chain of one arm and seed; in other processes than the first it does nothing.

    Args:
      workdir: folder of the run.
      arm: id of the arm.
      seed: seed of the arm.
    """

    def __init__(self, workdir: epath.Path, arm: str, seed: int):
        self._path = workdir / NAME
        self._arm, self._seed = arm, seed
        self._previous = ""

    def go_on(
        self, rounds_done: int, adapter: str, held: Callable[[str], dict] | None = None
    ) -> None:
        """Takes up the chain behind the last round that is done.

        Lines of later rounds are those of rounds that will be repeated.

        Args:
          rounds_done: rounds of the checkpoint that the run goes on from; 0 for none.
          adapter: hash of the adapter in it, "" where none is trained.
          held: gives the hashes of what a client holds now, which is to be what it held; None
            where nobody will learn from it.

        Raises:
          WorkdirError: the ledger does not lead to that checkpoint, or clients hold other pairs.
          StorageError: the storage does not give it.
        """
        self._previous = ""
        if not multihost.is_primary() or not rounds_done:
            return
        rows = run_files.read_lines(self._path, FIELDS)
        mine = [row for row in rows if self._is_mine(row) and row["round"] < rounds_done]
        problem = next(faults(mine), "")
        if not problem and len(mine) < rounds_done:
            problem = f"it ends after {len(mine)} of {rounds_done} rounds"
        if not problem and adapter and mine[-1].get("after") != adapter:
            problem = "its last line is of another adapter than the newest checkpoint"
        if not problem and held is not None:
            problem = _other_pairs(mine, held)
        if problem:
            raise WorkdirError(
                f"{self._path}, {self._arm} seed {self._seed}: {problem}, so nothing can be "
                "written behind it. `fedsafe verify` says all; put the file back, or choose "
                "another --workdir."
            )
        self._previous = line_hash(mine[-1])

    def add(self, round_number: int, entry: dict) -> str:
        """Writes a line in place of older ones of this round and later ones.

        Args:
          round_number: the round, from 0; for what comes behind all of them, their number.
          entry: what the line holds beside arm, seed, round and the hash before.

        Returns:
          The hash of the line; "" in other processes than the first.
        """
        if not multihost.is_primary():
            return ""
        row = {"arm": self._arm, "seed": self._seed, "round": round_number}
        row |= {"previous": self._previous} | entry
        run_files.replace_lines(
            self._path,
            lambda old: self._is_mine(old) and old["round"] >= round_number,
            [row],
            fields=FIELDS,
        )
        self._previous = line_hash(row)
        return self._previous

    def _is_mine(self, row: dict) -> bool:
        return row["arm"] == self._arm and row["seed"] == self._seed
