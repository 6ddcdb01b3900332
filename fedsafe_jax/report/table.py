"""The table of a run: its cells, and how it is printed."""

import sys

from rich.console import Console
from rich.table import Table


def cell(mean: float, interval, digits: int = 1) -> str:
    """`63.7 (59.0-68.1)`."""
    return f"{mean:.{digits}f} ({interval[0]:.{digits}f}-{interval[1]:.{digits}f})"


def table_rows(results: dict) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the final table, for terminal and report alike."""
    packaged = "package/" in results.get("sources", {}).get("advbench", "")
    header = [
        "algorithm",
        "arm",
        "harmful refused % \u2191" if packaged else "AdvBench refused % \u2191",
    ]
    header += ["harmless refused % \u2193", "HHH % \u2191", "benign loss \u2193"]
    compared = any("win_rate" in arm.get("utility", {}) for arm in results["arms"].values())
    header += ["win rate % \u2191"] * compared
    rows = []
    for arm_id, arm in results["arms"].items():
        row = [arm.get("algorithm", ""), arm_id.split("/")[-1]]
        for task, field, digits in (
            ("advbench", "safety", 1),
            ("over_refusal", "rate", 1),
            ("hhh", "accuracy", 1),
            ("utility", "nll", 3),
        ):
            found = arm.get(task)
            row.append(cell(found[field], found["ci95"], digits) if found else "")
        if compared:
            found = arm["utility"]
            known = "win_rate" in found
            row.append(cell(found["win_rate"], found["win_rate_ci95"]) if known else "")
        rows.append(row)
    return header, rows


def print_table(results: dict) -> None:
    """Prints the table with 95% intervals and, where there is one, the filter's quality."""
    header, rows = table_rows(results)
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
