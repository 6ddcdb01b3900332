"""The report's section on guards: what they did with the answers of each arm."""

from fedsafe_jax.report.blocks import Section, Table, Text
from fedsafe_jax.report.run_data import RunData

NOTE = (
    "Answers of the same weights under guards, over all seeds: how many a guardian gave in the "
    "model's place, how many became a refusal as a search found none within its budget, candidates "
    "generated for an answer, and seconds of an answer, judging left out."
)


def sections(run: RunData) -> list[Section]:
    """Returns a table of what guards did by arm and set, where there are any."""
    rows = [
        (arm, name, *cells(summary[name]["guards"]))
        for arm, summary in run.results["arms"].items()
        for name in run.sets
        if "guards" in summary.get(name, {})
    ]
    if not rows:
        return []
    header = ("arm", "set", "answers", "by the guardian", "refused", "candidates", "seconds")
    return [Section("Guards", [Text(NOTE), Table(header, rows)])]


def cells(did: dict) -> tuple[str, ...]:
    """Returns what guards did, as `Task.summarise` holds it, in the cells of a row."""
    count = max(did["answers"], 1)
    counts = (did["answers"], did["by_guardian"], did["failed_closed"])
    rates = f"{did['tried'] / count:.1f}", f"{did['seconds'] / count:.2f}"
    return (*map(str, counts), *rates)


def in_words(did: dict) -> str:
    """Returns in one line what guards did with the answers of a set."""
    count = max(did["answers"], 1)
    return (
        f"{did['answers']} answers under guards: {did['by_guardian']} by the guardian, "
        f"{did['failed_closed']} refused as no candidate was within the budget, "
        f"{did['tried'] / count:.1f} candidates and {did['seconds'] / count:.2f} s an answer"
    )
