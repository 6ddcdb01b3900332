"""The table of a run: an arm a row, a column for each figure of its tasks."""

import json
import sys
from collections.abc import Mapping

from etils import epath
from rich.console import Console
from rich.table import Table

from fedsafe_jax.evals.task import EvalSet, Task, select
from fedsafe_jax.evals.tasks import TASKS


def table_rows(results: dict, sets: Mapping[str, EvalSet]) -> tuple[list[str], list[list[str]]]:
    """Returns header and rows of the final table, for terminal and report alike.

    Args:
      results: content of `results.json`.
      sets: the evaluation sets by name; a figure that no arm has is left out.
    """
    arms = results["arms"]
    shown = [
        (name, column)
        for name, one in sets.items()
        for column in one.columns
        if any(column.field in arm.get(name, {}) for arm in arms.values())
    ]
    header = ["algorithm", "arm", *(column.header for _, column in shown)]
    rows = []
    for arm_id, arm in arms.items():
        name = arm_id.removeprefix(f"{arm['algorithm']}/")
        cells = [column.cell(arm.get(name_of_set, {})) for name_of_set, column in shown]
        rows.append([arm["algorithm"], name, *cells])
    return header, rows


def print_table(results: dict, sets: Mapping[str, EvalSet]) -> None:
    """Prints the table with 95% intervals and, where there is one, the filter's quality."""
    header, rows = table_rows(results, sets)
    table = Table(title="mean (95% interval)", title_justify="left")
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i < 2 else "right", no_wrap=i < 2)
    for row in rows:
        table.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    if "filter" in results:
        f = results["filter"]
        console.print(
            f"filter: accuracy {f['accuracy']:.1f}, precision {f['precision']:.1f}, "
            f"recall {f['recall']:.1f}, harmonic mean {f['hmean']:.1f}"
        )


def print_workdir(workdir: str, tasks: Mapping[str, Task] = TASKS) -> None:
    """Prints the table of a finished run from the files in its workdir.

    Args:
      workdir: the run's folder.
      tasks: registry of the tasks that were run.
    """
    folder = epath.Path(workdir)
    config, results = (
        json.loads((folder / name).read_text()) for name in ("config.json", "results.json")
    )
    print_table(results, select(config["eval"]["tasks"], tasks))
