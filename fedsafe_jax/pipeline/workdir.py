"""Beginning a run in its workdir, and going on with it; the files of an arm there."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from etils import epath
from ml_collections import ConfigDict

from fedsafe_jax import whole_files
from fedsafe_jax.cai.revise import Record, to_row
from fedsafe_jax.pipeline.answer_files import AnswerFiles
from fedsafe_jax.pipeline.arms import PlannedArm
from fedsafe_jax.pipeline.read_files import files_of
from fedsafe_jax.runtime import fingerprints, multihost, run_files
from fedsafe_jax.runtime.client_updates import ClientUpdates
from fedsafe_jax.runtime.progress import Progress
from fedsafe_jax.whole_files import WorkdirError

HASH = "adapter_sha256"  # of the adapter that was evaluated, in outcomes and results.json


def was_begun(config: ConfigDict, workdir: epath.Path, progress: Progress) -> bool:
    """Tells whether this run was begun before; all processes call this.

    Raises:
      WorkdirError: the workdir holds another run, or the run began with other files.
      StorageError: the storage does not give a file.
    """
    begun = multihost.first(lambda: run_files.check_config(workdir, config.to_dict()))
    # The others are told: what is checked next, all of them wait for.
    begun = multihost.broadcast_bool(bool(begun))
    if begun:
        multihost.first(lambda: _check_files(config, workdir, progress))
    return begun


def claim(config: ConfigDict, workdir: epath.Path) -> None:
    """Writes down the config and what was read; all processes call this, once all is read.

    Where reading fails, nothing is claimed: the config may be put right in the same workdir.

    Raises:
      WorkdirError, StorageError: as `was_begun`.
    """
    multihost.first(lambda: fingerprints.check(workdir, files_of(config)))
    multihost.first(lambda: run_files.claim_workdir(workdir, config.to_dict()))


def _check_files(config: ConfigDict, workdir: epath.Path, progress: Progress) -> None:
    """Checks that what was read at the first start is still the same."""
    if fingerprints.check(workdir, files_of(config)) == "written":
        progress.note(f"{workdir / fingerprints.NAME} was not there: the files read are as of now")


class ArmFiles(NamedTuple):
    """The files of one arm and seed in a run's workdir.

    Attributes:
      workdir: folder of the run.
      planned: the arm and its algorithm.
      seed: seed of the arm.
    """

    workdir: epath.Path
    planned: PlannedArm
    seed: int

    @property
    def checkpoints(self) -> epath.Path:
        """Folder of the checkpoints."""
        return run_files.arm_folder(self.workdir, "checkpoints", self.planned.folder, self.seed)

    def answers(self, adapter: str) -> AnswerFiles:
        """Returns the files of its answers; those of another adapter are not read.

        Args:
          adapter: hash of the adapter that is evaluated; "" for none.
        """
        folder = self.workdir / "evals" / f"{self.planned.folder}_seed{self.seed}"
        return AnswerFiles(folder, adapter)

    @property
    def updates(self) -> ClientUpdates:
        """What clients sent in the rounds that are kept."""
        folder = run_files.arm_folder(self.workdir, "updates", self.planned.folder, self.seed)
        return ClientUpdates(folder)

    def read_outcome(self, check: Callable[[dict], None]) -> dict | None:
        """Returns the outcomes of an arm that is done, or None; damaged ones are set aside.

        Args:
          check: raises one of Python's own errors where outcomes are not those of the run's tasks.
        """
        outcome = whole_files.read_json(self._outcome)
        if outcome is None:
            return None
        try:
            if self.planned.arm.trains and not isinstance(outcome[HASH], str):
                raise TypeError(f"{HASH} is no text")
            check(outcome)
        except (TypeError, KeyError, ValueError, IndexError, AttributeError) as error:
            whole_files.set_aside(self._outcome, f"it holds no outcomes of the run ({error!r:.80})")
            return None
        return outcome

    def check_hash(self, outcome: dict, rounds_done: int, rounds: int, here: str) -> None:
        """Checks that outcomes are of the adapter that the newest checkpoint holds.

        Args:
          outcome: outcomes of the arm.
          rounds_done: rounds of the newest checkpoint.
          rounds: rounds of the run.
          here: hash of its adapter.

        Raises:
          WorkdirError: they are not, and nothing is written under their scores.
        """
        if rounds_done == rounds and outcome[HASH] == here:
            return
        newest = f"is of round {rounds_done}" if rounds_done else "is not there"
        problem = f"the newest checkpoint in {self.checkpoints} {newest}"
        if rounds_done == rounds:
            problem = f"the checkpoint {self.checkpoints / str(rounds)} holds another adapter"
        raise WorkdirError(
            f"{self._outcome} has the scores of the adapter after round {rounds}, but {problem}. "
            "results.json and export/ are left as they are. Put that checkpoint back, or move "
            f"{self._outcome.name} away: then the same command repeats the missing rounds, and "
            "evaluates again."
        )

    def write_outcome(self, outcome: dict) -> None:
        """Writes the outcomes of an arm that is done."""
        run_files.write_json(self._outcome, outcome)

    def record_rows(self, t: int, cai_records: Sequence[Record]) -> list[dict]:
        """Returns a round's records of CAI as the rows of their file.

        Args:
          t: number of the round, from 0.
          cai_records: its records of CAI.
        """
        key = {"arm": self.planned.id, "seed": self.seed, "round": t}
        return [key | to_row(record) for record in cai_records]

    def record(self, row: dict, cai_rows: list[dict]) -> None:
        """Writes a round's row of metrics and records of CAI in place of older ones."""
        t = row["round"]
        if cai_rows:
            run_files.replace_lines(
                self.workdir / "cai" / run_files.cai_name(t),
                self.is_mine,
                cai_rows,
                fields=run_files.OF_A_ROUND,
            )
        run_files.replace_lines(
            self.workdir / "metrics.jsonl",
            lambda old: self.is_mine(old) and old["round"] >= t,
            [row],
            fields=run_files.OF_A_ROUND,
        )

    def is_mine(self, row: dict) -> bool:
        """Tells whether a row of a shared file is of this arm and seed."""
        return row["arm"] == self.planned.id and row["seed"] == self.seed

    @property
    def _outcome(self) -> epath.Path:
        return run_files.outcome_file(self.workdir, self.planned.folder, self.seed)
