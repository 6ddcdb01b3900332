"""The report's section of answers: the same prompts, answered by every arm."""

from fedsafe_jax.report.blocks import Heading, Section, Table
from fedsafe_jax.report.run_data import RunData

SHOWN = 4  # prompts of each task


def sections(run: RunData) -> list[Section]:
    """Returns a table of prompts and answers for every task whose outcomes hold samples."""
    blocks: list = []
    for name, one in run.sets.items():
        samples = {
            arm: seeds[0][name]["samples"]
            for arm, seeds in run.outcomes.items()
            if "samples" in seeds[0].get(name, {})
        }
        if samples:
            first, *_ = samples.values()
            count = min(SHOWN, *(len(some) for some in samples.values()))
            rows = [
                (first[i]["prompt"], *(some[i]["answer"] for some in samples.values()))
                for i in range(count)
            ]
            title = one.task.title
            blocks.append(Heading(title[:1].upper() + title[1:]))
            blocks.append(Table(("prompt", *samples), rows, prose=True))
    return [Section("Answers before and after each defence", blocks)]
