"""The report's last sections: the data that were read, the whole config, device and versions."""

import json

from fedsafe_jax.report.blocks import Code, Section, Table, Text
from fedsafe_jax.report.run_data import RunData

COUNTS = {  # field of the counts: title of the column
    "read": "read",
    "disputed": "disputed",
    "dropped_near_evaluation": "near an evaluation prompt",
    "dropped_heldout": "held out",
    "kept": "kept",
}


def sections(run: RunData) -> list[Section]:
    """Returns the counts of each pool, and what would make the run again."""
    rows = [
        (pool, "", *(counts[field] for field in COUNTS))
        for pool, counts in run.results["data"].items()
    ]
    made_with = f"{run.results['device']}, {run.results['versions']}"
    return [
        Section(
            "Data",
            [
                Table(("pool", "", *COUNTS.values()), rows),
                Text("Disputed: labelled unsafe, but begins as a refusal."),
            ],
        ),
        Section("Config", [Code(json.dumps(run.config, indent=2)), Text(made_with)]),
    ]
