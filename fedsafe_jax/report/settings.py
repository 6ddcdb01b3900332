"""The report's last sections: the data that were read, the whole config, device and versions."""

import json

from fedsafe_jax.report.blocks import Code, Section, Table, Text
from fedsafe_jax.report.run_data import RunData

COUNTS = {  # field of the counts: title of the column
    "read": "read",
    "without_answer": "without answer",
    "disputed": "disputed",
    "dropped_near_evaluation": "near an evaluation prompt",
    "dropped_heldout": "held out",
    "kept": "kept",
}


def sections(run: RunData) -> list[Section]:
    """Returns the counts of each pool, and what would make the run again."""
    rows = [
        (pool, "", *(counts.get(field, "") for field in COUNTS))
        for pool, counts in run.results["data"].items()
        if isinstance(counts, dict)
    ]
    made_with = f"{run.results['device']}, {run.results['versions']}"
    return [
        Section(
            "Data",
            [
                Table(("pool", "", *COUNTS.values()), rows),
                Text(
                    "Disputed: labelled unsafe, but begins as a refusal; of given revisions, those "
                    "that the check which made them dropped."
                ),
                *_held(run.results),
            ],
        ),
        Section("Config", [Code(json.dumps(run.config, indent=2)), Text(made_with)]),
    ]


def _held(results: dict) -> list[Table]:
    """Returns the table of what clients hold before any filter, [] where it is not known."""
    data, rows = results["data"], []
    if "pairs_held" not in data:
        return []
    for i, seed in enumerate(results["seeds"]):
        by_client = data["harmful_share_by_client"][i]
        shares = [share for share in by_client if share is not None]
        empty = [str(client) for client, share in enumerate(by_client) if share is None]
        whole = data["harmful_share_held"][i]
        rows.append(
            (
                f"seed {seed}",
                "",
                data["pairs_held"][i],
                "undefined" if whole is None else f"{whole:.1%}",
                f"{min(shares):.1%} to {max(shares):.1%}" if shares else "undefined",
                ", ".join(empty) or "none",
            )
        )
    header = ("", "", "pairs held", "harmful", "harmful by client", "clients without data")
    return [Table(header, rows)]
