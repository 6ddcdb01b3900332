"""The report's section of paired differences between arms."""

from fedsafe_jax.report.blocks import Section, Table, Text
from fedsafe_jax.report.run_data import RunData
from fedsafe_jax.report.table import difference_rows


def sections(run: RunData) -> list[Section]:
    """Returns the table of differences with its note; nothing where no two arms are compared."""
    header, rows = difference_rows(run.results, run.sets, full=True)
    if not rows:
        return []
    note = (
        "Arms answer the same items, so each item is compared with itself: these intervals (95%) "
        "decide between two arms, not whether those of the table above overlap. p is of the exact "
        "test of the items that differ (McNemar's, for one seed), and is not corrected for the "
        "number of comparisons."
    )
    return [Section("Differences between arms", [Text(note), Table(header, rows)])]
