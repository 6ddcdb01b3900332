"""The report's section on judges: a rate by each rule, beside that of the task it is shown with."""

from fedsafe_jax.evals.task import UNDEFINED, Column
from fedsafe_jax.report.blocks import Section, Table
from fedsafe_jax.report.run_data import RunData


def sections(run: RunData) -> list[Section]:
    """Returns a table of the rates by judge for every pair of tasks that are shown together."""
    pairs = [
        (name, other_name)
        for name, one in run.sets.items()
        for other_name, other in run.sets.items()
        if one.task.beside == other.task.name
    ]
    tables = [_table(run, name, beside) for name, beside in pairs]
    blocks = [table for table in tables if table.rows]
    return [Section("Judges", blocks)] if blocks else []


def _table(run: RunData, name: str, beside: str) -> Table:
    columns = [run.sets[key].task.columns[0] for key in (name, beside)]
    rows = []
    for arm_id, arm in run.results["arms"].items():
        if all("by_judge" in arm.get(key, {}) for key in (name, beside)):
            for judge, rates in arm[name]["by_judge"].items():
                # A judge of harm says nothing of harmless requests.
                both = rates, arm[beside]["by_judge"].get(judge)
                cells = (_cell(r, c) for r, c in zip(both, columns, strict=True))
                rows.append((arm_id, judge, *cells))
    return Table(("arm", "judge", *(column.label for column in columns)), rows)


def _cell(rates: dict | None, column: Column) -> str:
    if rates is None:
        return ""
    value = rates[column.field]
    return UNDEFINED if value is None else f"{value:.1f}"
