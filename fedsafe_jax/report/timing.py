"""The report's section on time: seconds of each phase, over all rounds of an arm."""

import collections

from fedsafe_jax.report.blocks import Section, Table
from fedsafe_jax.report.run_data import RunData


def sections(run: RunData) -> list[Section]:
    """Returns a table of seconds by arm and phase."""
    if not run.rows:
        return []
    totals: dict = collections.defaultdict(lambda: collections.defaultdict(float))
    for row in run.rows:
        for phase, seconds in row["seconds"].items():
            totals[row["arm"]][phase] += seconds
    phases = sorted({phase for by_phase in totals.values() for phase in by_phase})
    table = [
        (arm, "", *(f"{by_phase.get(phase, 0):.1f}" for phase in phases))
        for arm, by_phase in totals.items()
    ]
    return [Section("Seconds by phase", [Table(("arm", "", *phases), table)])]
