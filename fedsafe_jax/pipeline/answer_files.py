"""Every answer of an evaluation, kept as JSON lines: `evals/ARM_seedK/TASK.jsonl` of a workdir."""

import dataclasses
import logging

from etils import epath

from fedsafe_jax import whole_files
from fedsafe_jax.pipeline.evaluation import AnswerStore, Rows
from fedsafe_jax.runtime import run_files


@dataclasses.dataclass(frozen=True)
class AnswerFiles(AnswerStore):
    """The answers of one arm and seed.

    Attributes:
      folder: folder of the files, a file for each set.
      adapter: hash of the adapter that answers; "" for none.
    """

    folder: epath.Path
    adapter: str = ""

    def read(self, name: str, key: dict) -> Rows | None:
        """Returns the rows of a set that were asked as `key` says; None without, or where the task
        or its prompts have changed since."""
        rows, key = run_files.read_lines(self._path(name)), self._whole(key)
        if not rows:
            return None
        if any(row.get(field) != value for row in rows for field, value in key.items()):
            logging.warning(
                "%s holds answers of another adapter, or to other prompts; they are asked anew",
                name,
            )
            return None
        return [{field: row[field] for field in row if field not in key} for row in rows]

    def write(self, name: str, key: dict, rows: Rows) -> None:
        """Writes the rows of a set, each with the task, its version and the hash of its prompts."""
        whole_files.write(
            self._path(name), whole_files.to_json_lines([self._whole(key) | row for row in rows])
        )

    def _whole(self, key: dict) -> dict:
        return key | ({"adapter": self.adapter} if self.adapter else {})

    def _path(self, name: str) -> epath.Path:
        return self.folder / f"{name}.jsonl"
