"""The report's section by round: the clients' loss, and the headline figure of every task."""

import collections
from collections.abc import Callable

from fedsafe_jax.report.blocks import COLOURS, Section, figure
from fedsafe_jax.report.run_data import RunData


def sections(run: RunData) -> list[Section]:
    """Returns the curves, which are written to `loss.png` and `TASK_by_round.png`."""
    if not run.rows:
        return []

    def curve(stem: str, value: Callable, label: str):
        return figure(run.figures / f"{stem}.png", lambda plt: _draw(plt, run.rows, value, label))

    blocks = []
    if any("clients" in row for row in run.rows):
        blocks.append(curve("loss", lambda row: row["loss"], "client loss"))
    probed = {name for row in run.rows for name in row.get("eval", {})}
    for name, one in run.sets.items():
        if name in probed:
            value = lambda row, name=name: row.get("eval", {}).get(name)  # noqa: E731
            blocks.append(curve(f"{name}_by_round", value, one.columns[0].label))
    return [Section("By round", blocks)] if blocks else []


def _draw(plt, rows: list[dict], value: Callable, label: str):
    """Draws the mean over seeds of `value(row)`, a line for each arm."""
    drawing, axis = plt.subplots(figsize=(7, 3.6))
    series = collections.defaultdict(lambda: collections.defaultdict(list))
    for row in rows:
        if (point := value(row)) is not None:
            series[row["arm"]][row["round"] + 1].append(point)
    for i, (arm, points) in enumerate(series.items()):
        x = sorted(points)
        y = [sum(points[r]) / len(points[r]) for r in x]
        colour = COLOURS[(i + 1) % len(COLOURS)]
        axis.plot(x, y, label=arm, color=colour, marker="o", markersize=3)
    axis.set_xlabel("round")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_ylabel(label)
    if series:  # no line where no figure is a number
        axis.legend(fontsize=8)
    return drawing
