"""`report.html` and `figures/*.png`: the sections in order."""

from collections.abc import Mapping

from etils import epath

from fedsafe_jax import whole_files
from fedsafe_jax.evals.task import EvalSet
from fedsafe_jax.report import (
    answers,
    arms,
    attribution,
    cai,
    clients,
    curves,
    differences,
    guards,
    judges,
    safety_filter,
    settings,
    tensorboard,
    timing,
)
from fedsafe_jax.report.rendering import render
from fedsafe_jax.report.run_data import RunData
from fedsafe_jax.runtime import run_files

TITLE = "Federated fine-tuning, safety filter and Constitutional AI"
# Each has `sections(run) -> [Section]`, empty where the run has nothing to show of it.
PARTS = (
    arms,
    differences,
    guards,
    curves,
    clients,
    attribution,
    safety_filter,
    cai,
    judges,
    answers,
    timing,
    settings,
)


def write(
    workdir: epath.Path,
    config: dict,
    results: dict,
    outcomes: dict[str, list[dict]],
    sets: Mapping[str, EvalSet],
) -> None:
    """Writes the report, the figures and TensorBoard events of a finished run.

    Args:
      workdir: the run's folder, with its `metrics.jsonl`.
      config: the run's config, as in `config.json`.
      results: content of `results.json`.
      outcomes: outcomes of every item by arm and seed; some answers are shown.
      sets: the evaluation sets by name.

    Raises:
      StorageError: a file cannot be written.
    """
    whole_files.make_folder(workdir / "figures")
    run = RunData(
        workdir=workdir,
        config=config,
        results=results,
        outcomes=outcomes,
        sets=sets,
        rows=run_files.read_lines(workdir / "metrics.jsonl", run_files.OF_A_ROUND),
    )
    shown = [section for part in PARTS for section in part.sections(run)]
    text = render("page.html", title=TITLE, sections=shown)
    whole_files.write(workdir / "report.html", text.encode("utf-8", errors="replace"))
    with whole_files.storage(workdir / "tensorboard"):
        tensorboard.write(workdir, run.rows)
