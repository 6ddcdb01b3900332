"""The terminal's view of a compilation."""

import math
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from fedsafe_jax.aot.compilation import KINDS, Result, ratio
from fedsafe_jax.aot.targets import GIB, Target


def note(text: str) -> None:
    """Says on stderr what is being compiled."""
    print(f"compiling {text}", file=sys.stderr, flush=True)


def show(results: Sequence[Result], target: Target) -> None:
    """Prints a table of memory, and one of operations and communication.

    Args:
      results: results of a target's programs.
      target: the target.
    """
    console = Console(width=None if sys.stdout.isatty() else 120)
    room = f", {target.memory / GIB:.1f} GiB each" if target.memory else ""
    devices = max((result.devices for result in results), default=1)
    memory = Table(
        title=f"GiB a device: {target.name}, {devices} device(s){room}", title_justify="left"
    )
    memory.add_column("program")
    for kind in (*KINDS, "in all", "fits"):
        memory.add_column(kind, justify="right")
    for result in results:
        over = f": {result.over_gib:,.1f} too many" if result.over_gib else ""
        fits = "yes" if result.fits else f"no{over}"
        sizes = [_size(result.gib.get(kind)) for kind in KINDS]
        memory.add_row(result.program, *sizes, _size(sum(result.gib.values())), fits)
    work = Table(title="Operations and communication", title_justify="left")
    for column in ("program", "attention", "MFLOP/token", "least", "ratio", "useful"):
        work.add_column(column, justify="left" if column in ("program", "attention") else "right")
    work.add_column("in the local steps", justify="right")
    work.add_column("elsewhere", justify="right")
    work.add_column("seconds", justify="right")
    for result in results:
        share = ratio(result)
        work.add_row(
            result.program,
            result.attention,
            f"{result.flops_per_useful_token / 1e6:,.1f}",
            f"{result.minimum_flops_per_token / 1e6:,.1f}",
            "" if math.isnan(share) else f"{share:.2f}",
            f"{result.useful_share:.0%}" if result.useful_share else "",
            _collectives(result.collectives_in_steps),
            _collectives(result.collectives_outside),
            f"{result.seconds:,.0f}",
        )
    console.print(memory)
    console.print(work)


def _size(gib: float | None) -> str:
    if gib is None:
        return ""
    return "0" if not gib else f"{gib:.2f}" if gib >= 0.005 else "<0.01"


def _collectives(listed: Sequence[dict]) -> str:
    """Returns the kinds of collectives with their bytes in all, or "none"."""
    total: dict[str, int] = {}
    for one in listed:
        total[one["op"]] = total.get(one["op"], 0) + one["bytes"] * one["times"]
    return ", ".join(f"{op} {size / 2**20:,.2f} MiB" for op, size in total.items()) or "none"
