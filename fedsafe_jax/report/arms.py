"""The report's first section: the table of all arms, and bars of the rates."""

from fedsafe_jax.evals.task import HELDOUT
from fedsafe_jax.report.blocks import COLOURS, Section, Table, Text, figure
from fedsafe_jax.report.run_data import RunData
from fedsafe_jax.report.table import table_rows


def sections(run: RunData) -> list[Section]:
    """Returns the table with its note, and the bars, which are written to `arms.png`."""
    asked = [one for one in run.sets.values() if one.source != HELDOUT]
    prompts = "; ".join(f"{one.task.title}: {one.source}" for one in asked)
    note = "Mean and 95% interval; an arrow says which direction is better. "
    if asked:
        judge = run.config["eval"]["judges"][0]
        note += f"Refusals by the judge '{judge}'. {prompts[:1].upper()}{prompts[1:]}. "
    note += _cuts(run)
    seeds = list(run.config["seeds"])
    note += f"Seeds: {seeds}. "
    note += (
        "An interval covers the prompts and the seeds."
        if len(seeds) > 1
        else "With one seed an interval covers the prompts, and nothing of the spread between runs."
    )
    blocks = [Text(note), Table(*table_rows(run.results, run.sets))]
    if panels := _panels(run):
        blocks.append(figure(run.figures / "arms.png", lambda plt: _bars(plt, run, panels)))
    return [Section("", blocks)]


def _cuts(run: RunData) -> str:
    """Says which sets hold dialogues that were too long; they are the same in every arm."""
    said = ""
    for name, one in run.sets.items():
        summary = next((arm[name] for arm in run.results["arms"].values() if name in arm), {})
        if cut := summary.get("cut"):
            longest = run.config["eval"]["max_length"]
            said += f"{cut} of {summary['n']} {one.task.title} are cut to {longest} tokens. "
    return said


def _panels(run: RunData) -> list[tuple]:
    """Returns `(name of the set, column)` of the rates that every arm has."""
    arms = run.results["arms"].values()
    return [
        (name, column)
        for name, one in run.sets.items()
        for column in one.columns
        if column.unit == "%"
        and all(arm.get(name, {}).get(column.field) is not None for arm in arms)
    ]


def _bars(plt, run: RunData, panels: list[tuple]):
    arms = run.results["arms"]
    height = 1.2 + 0.42 * len(arms)
    drawing, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), height), squeeze=False)
    for axis, (name, column) in zip(axes[0], panels, strict=True):
        for y, arm in enumerate(arms.values()):
            mean, (low, high) = arm[name][column.field], arm[name][column.interval]
            axis.barh(y, mean, color=COLOURS[y % len(COLOURS)])
            error = [[max(mean - low, 0)], [max(high - mean, 0)]]
            axis.errorbar(mean, y, xerr=error, color="black", capsize=3)
        axis.set_yticks(range(len(arms)), arms if axis is axes[0][0] else [""] * len(arms))
        axis.invert_yaxis()
        axis.set_title(column.label)
        axis.set_xlim(0, 100)
    return drawing
