"""The forms that answers are exported in, by name: `EXPORTS`."""

import os
from collections.abc import Callable, Sequence

from fedsafe_jax import whole_files
from fedsafe_jax.interop import inspect_log, lm_eval_samples
from fedsafe_jax.interop.origin import Origin, now

Rows = Sequence[dict]  # see `evals.answers`


def _inspect(rows: Rows, origin: Origin) -> tuple[str, bytes]:
    log = inspect_log.log_of(rows, origin, now())
    return inspect_log.file_name(log), whole_files.to_json(log, indent=1) + b"\n"


def _lm_eval(rows: Rows, origin: Origin) -> tuple[str, bytes]:
    samples = lm_eval_samples.samples_of(rows, origin)
    return lm_eval_samples.file_name(origin, now()), whole_files.to_json_lines(samples)


# `(rows, origin) -> (name below the folder, content)`.
EXPORTS: dict[str, Callable[[Rows, Origin], tuple[str, bytes]]] = {
    "inspect": _inspect,
    "lm_eval": _lm_eval,
}


def write(folder: str, forms: Sequence[str], rows: Rows, origin: Origin) -> list[str]:
    """Writes the answers of one task, a file a form.

    Args:
      folder: folder of the files, created if missing.
      forms: some of `EXPORTS`.
      rows: rows of answers, at least one.
      origin: whose answers they are.

    Returns:
      The paths of the files.

    Raises:
      StorageError: one cannot be written.
    """
    paths = []
    for form in forms:
        name, content = EXPORTS[form](rows, origin)
        paths.append(os.path.join(folder, name))
        whole_files.write(paths[-1], content)
    return paths
