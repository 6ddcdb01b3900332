"""The report's last sections: the data that were read, the whole config, device and versions."""

import json

from fedsafe_jax.report.blocks import NOTES, Code, Section, Table, Text
from fedsafe_jax.report.run_data import RunData

COUNTS = {  # field of the counts: title of the column
    "read": "read",
    "without_answer": "without answer",
    "disputed": "disputed",
    "dropped_near_evaluation": "near an evaluation prompt",
    "dropped_heldout": "held out",
    "kept": "kept",
}


CHANGED = (
    "Lost: nothing is left to learn within seq_len. Turns are merged where the chat template "
    "refuses them as they are; control tokens in messages become plain text; what is too long "
    "loses its oldest turns first."
)


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
        Section(
            "Config",
            [Code(json.dumps(run.config, indent=2)), Text(made_with), *_made_by(run.results)],
        ),
    ]


def _made_by(results: dict) -> list[Code | Text]:
    """Returns the package and commit that made the run, when, and the command; [] where unknown."""
    if not (made := results.get("made_by")):
        return []
    at = f" at {made['commit']}" if made["commit"] else ""
    said = f"fedsafe_jax {made['fedsafe_jax']}{at}, Python {made['python']}, {made['date']}:"
    return [Text(said), Code(made["command"])]


def _held(results: dict) -> list[Table | Text]:
    """Returns the table of what clients hold before any filter, [] where it is not known."""
    data, rows = results["data"], []
    if "pairs_held" not in data:
        return []
    blank, notes = [""] * len(results["seeds"]), data.get("notes", [{}] * len(results["seeds"]))
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
                data.get("pairs_lost", blank)[i],
                *(notes[i].get(name, 0) for name in NOTES),
            )
        )
    header = ("", "", "pairs held", "harmful", "harmful by client", "clients without data", "lost")
    return [Table((*header, *NOTES.values()), rows), Text(CHANGED)]
