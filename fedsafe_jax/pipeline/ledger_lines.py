"""What a run writes into its ledger, see `runtime.ledger`."""

import hashlib
from collections.abc import Sequence

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from fedsafe_jax import whole_files
from fedsafe_jax.data.chat import Encoded
from fedsafe_jax.pipeline.clients import Clients
from fedsafe_jax.pipeline.workdir import ArmFiles
from fedsafe_jax.runtime import fingerprints, ledger, multihost, run_files


def pairs_hash(pairs: Sequence[Encoded]) -> str:
    """Returns the SHA-256 of encoded pairs in their order: token ids, weights of targets, and what
    these learn where it is not the text."""
    digest = hashlib.sha256()
    for one in pairs:
        digest.update(len(one.ids).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(one.ids, "<i4").tobytes())
        digest.update(np.ascontiguousarray(one.loss_mask, "<f4").tobytes())
        # Always as many bytes, so that no two lists of pairs are the same ones.
        target = -1 if one.target is None else int(one.target)
        digest.update(target.to_bytes(8, "little", signed=True))
    return digest.hexdigest()


class ArmLines:
    """Writes the ledger's lines of one arm and seed.

    Args:
      config: config of the run.
      clients: clients of the seed; at real sites their pairs are not known, and have no hash.
      files: files of the arm and seed.
    """

    def __init__(self, config: ConfigDict, clients: Clients, files: ArmFiles):
        self._clients, self._files = clients, files
        self._filters = files.planned.arm.filter
        self._ledger = ledger.ArmLedger(files.workdir, files.planned.id, files.seed)
        self._known: dict[int, dict] = {}
        self._adapter = ""
        self._of_run = of_run(config, files.workdir) if multihost.is_primary() else {}

    def go_on(self, rounds_done: int, adapter: str) -> None:
        """Takes up the chain, see `ArmLedger.go_on`; in all processes, of which none fails alone.

        Args:
          rounds_done: rounds that are done.
          adapter: hash of the adapter after them.
        """
        multihost.first(
            lambda: self._ledger.go_on(
                rounds_done, adapter, held=lambda client: self._held(int(client))
            )
        )
        self._adapter = adapter

    def add_round(
        self, row: dict, cai_rows: list[dict], learned_from: Sequence[int], adapter: str
    ) -> dict:
        """Writes the line of a round.

        Args:
          row: the round's row of metrics.
          cai_rows: rows of its records of CAI.
          learned_from: clients whose pairs it could learn from.
          adapter: hash of the adapter after the round.

        Returns:
          The row, which names the line; in other processes than the first as it was.
        """
        if not multihost.is_primary():
            return row
        entry = self._of_run | {"before": self._adapter, "after": adapter}
        entry["clients"] = {str(client): self._held(client) for client in learned_from}
        entry["metrics"] = ledger.of_json(row)
        if cai_rows:
            entry["cai"] = ledger.of_bytes(whole_files.to_json_lines(cai_rows))
        if updates := self._files.updates.hashes(row["round"] + 1):
            entry["updates"] = updates
        self._adapter = adapter
        return row | {ledger.KEY: self._ledger.add(row["round"], entry)}

    def repeat(self, row: dict, line: dict) -> dict:
        """Writes the line of a round that another run has done, and this one takes over.

        Args:
          row: the round's row of metrics, as it is in this run.
          line: the line of the other run's ledger.

        Returns:
          The row, which names the new line.
        """
        place = (*run_files.OF_A_ROUND, "previous")
        entry = {name: value for name, value in line.items() if name not in place}
        entry |= self._of_run | {"metrics": ledger.of_json(row)}
        return row | {ledger.KEY: self._ledger.add(row["round"], entry)}

    def add_outcome(self, rounds: int, outcome: dict) -> None:
        """Writes the line of an arm's outcomes, behind those of its rounds.

        Args:
          rounds: rounds of the arm, 0 without training.
          outcome: outcomes by task.
        """
        entry = self._of_run | {"outcome": ledger.of_json(outcome)}
        if self._adapter:
            entry |= {"before": self._adapter}
        self._ledger.add(rounds, entry)

    def _held(self, client: int) -> dict:
        """Returns the hashes of a client's pairs and filter decisions, each computed once."""
        if client not in self._known:
            everyone, held = self._clients, {}
            if everyone.plain is not None:
                held["pairs"] = pairs_hash(everyone.plain[client])
            if self._filters and everyone.filtered is not None:
                held["kept"] = pairs_hash(everyone.filtered[client])
            if self._filters and everyone.flagged is not None:
                held["filter"] = ledger.of_json(
                    {
                        "threshold": everyone.threshold,
                        "flagged": np.asarray(everyone.flagged[client]).astype(int).tolist(),
                        "counts": everyone.counts[client]._asdict(),
                    }
                )
            self._known[client] = held
        return self._known[client]


def add_export(files: ArmFiles, rounds: int, exported: dict[str, str]) -> None:
    """Writes the line of an arm's export, behind its outcomes'; the first process calls this.

    Args:
      files: files of the arm and seed.
      rounds: rounds of the arm.
      exported: SHA-256 of each file by its name below `export/`.

    Raises:
      WorkdirError: the ledger does not lead to the end of the arm.
    """
    chain = ledger.ArmLedger(files.workdir, files.planned.id, files.seed)
    chain.go_on(rounds + 1, "")
    chain.add(rounds + 1, {"export": exported})


def of_run(config: ConfigDict, workdir: epath.Path) -> dict[str, str]:
    """Returns the hashes of the config and of all files that a run reads.

    Args:
      config: config of the run.
      workdir: folder of the run, with its `inputs.json`.
    """
    inputs = ledger.of_json(fingerprints.hashes(workdir))
    return {"config": ledger.of_json(config.to_dict()), "inputs": inputs}
