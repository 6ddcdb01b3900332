"""The table of a run: an arm a row, a column for each figure of its tasks."""

import json
import sys
from collections.abc import Mapping

from etils import epath
from rich.console import Console
from rich.table import Table

from fedsafe_jax.evals.task import Column, EvalSet, Task, select, under_guards
from fedsafe_jax.evals.tasks import TASKS
from fedsafe_jax.filters.quality import shown

NO_BREAK = "\u00a0"  # a space at which a line does not end


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


def difference_rows(
    results: dict, sets: Mapping[str, EvalSet], full: bool = False
) -> tuple[list[str], list[list[str]]]:
    """Returns header and rows of the paired differences between arms.

    Args:
      results: content of `results.json`.
      sets: the evaluation sets by name.
      full: whether all figures of a task are shown, with their p-values, or the first one alone.
    """
    by_key = {
        (d["arm"], d["reference"], d["task"], d["field"]): d for d in results.get("differences", ())
    }
    shown_columns = [
        (name, column)
        for name, one in sets.items()
        for column in (one.columns if full else one.columns[:1])
        if any(key[2:] == (name, column.field) for key in by_key)
    ]
    rows = []
    for arm, reference in dict.fromkeys(key[:2] for key in by_key):
        keys = ((arm, reference, name, column.field) for name, column in shown_columns)
        cells = [
            _difference(column, by_key[key], full) if key in by_key else ""
            for key, (_, column) in zip(keys, shown_columns, strict=True)
        ]
        rows.append([arm, reference, *cells])
    return ["arm", "less that of", *(column.header for _, column in shown_columns)], rows


def _difference(column: Column, gap: Mapping, full: bool) -> str:
    if not full or gap["p"] is None:
        return column.difference(gap)
    p = "p < 0.001" if gap["p"] < 0.001 else f"p = {gap['p']:.3f}"
    return f"{column.difference(gap)}, {p.replace(' ', NO_BREAK)}"


def print_table(results: dict, sets: Mapping[str, EvalSet]) -> None:
    """Prints the arms and their differences with 95% intervals, and the filter's quality and
    epsilon, if there are."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(_table("mean (95% interval)", *table_rows(results, sets)))
    header, rows = difference_rows(results, sets)
    if rows:
        title = "difference on the same items (95% interval)"
        console.print(_table(title, header, rows))
    if "filter" in results:
        f = results["filter"]
        console.print(
            f"filter: accuracy {shown(f['accuracy'])}, precision {shown(f['precision'])}, "
            f"recall {shown(f['recall'])}, harmonic mean {shown(f['hmean'])}"
        )
    if "privacy" in results:
        console.print(results["privacy"]["statement"])


def _table(title: str, header: list[str], rows: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i < 2 else "right", no_wrap=i < 2)
    for row in rows:
        table.add_row(*row)
    return table


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
    sets = under_guards(select(config["eval"]["tasks"], tasks), results.get("guards", ""))
    print_table(results, sets)
