"""Answers out of the files of other harnesses, as rows that judges read."""

import logging
import pathlib

from fedsafe_jax.data.examples import SourceError
from fedsafe_jax.data.sources import read_rows
from fedsafe_jax.interop import inspect_rows, lm_eval_rows
from fedsafe_jax.interop.inspect_archive import read_archive

Rows = list[tuple[str, dict]]  # (place to name in an error, row)


def read(path: pathlib.Path) -> Rows:
    """Reads a file of answers: ours, inspect_ai's log, or lm-evaluation-harness' samples.

    What kind of file it is, its contents say. What is left out, such as samples that ended in an
    error, is counted in a warning.

    Args:
      path: the file.

    Returns:
      Rows with `messages` and `answer`; of a file that is of neither harness as they stand there.

    Raises:
      SourceError: the file cannot be read, or a row of a harness holds no answer; it is named.
    """
    if path.suffix == ".eval":
        rows, notes = inspect_rows.rows_of(str(path), read_archive(path))
    else:
        rows, notes = read_rows(path.name, str(path.parent)), []
        if len(rows) == 1 and inspect_rows.is_log(rows[0][1]):
            rows, notes = inspect_rows.rows_of(str(path), rows[0][1])
        elif any(lm_eval_rows.is_sample(row) for _, row in rows):
            rows, notes = lm_eval_rows.rows_of(rows)
    for note in notes:
        logging.warning("%s: %s", path, note)
    if not rows:
        raise SourceError(f"{path}: holds no answer.")
    return rows
