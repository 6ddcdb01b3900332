"""The report's section on Constitutional AI: what it cost, what it dropped, what it changed."""

import collections

from fedsafe_jax.report.blocks import NOTES, Heading, Section, Table
from fedsafe_jax.report.run_data import RunData
from fedsafe_jax.runtime import run_files

SHOWN = 10  # pairs
REASONS = (
    "empty",
    "cut",
    "critique",
    "unchanged",
    "still harmful",
    "over-refusal",
    "not safer",
    "were right",
)


def sections(run: RunData) -> list[Section]:
    """Returns counts and costs by arm, probes, and answers before and after revision."""
    by_arm = collections.defaultdict(list)
    for row in run.rows:
        if "cai" in row:
            by_arm[row["arm"]].append(row)
    if not by_arm:
        return []
    counts = ("arm", "", "rounds with CAI", "revisions kept", "of these replaced", *REASONS)
    costs = ("arm", "", "pairs", "steps", "tokens generated", "tokens trained", "seconds")
    changed = ("arm", "", "dialogues lost", *NOTES.values())
    blocks = [
        Table(counts, [(arm, "", *_counts(rows)) for arm, rows in by_arm.items()]),
        Table(costs, [(arm, "", *_costs(rows)) for arm, rows in by_arm.items()]),
        Table(changed, [(arm, "", *_changed(rows)) for arm, rows in by_arm.items()]),
    ]
    if probes := _probes(by_arm):
        blocks.append(Heading("Refusal before, between and after CAI's steps, in percent"))
        blocks.append(Table(("arm", "seed", "by round"), probes))
    if pairs := _pairs(run):
        blocks.append(Heading("Before and after revision"))
        blocks.append(Table(("prompt", "before", "after"), pairs, prose=True))
    return [Section("Constitutional AI", blocks)]


def _total(rows: list[dict], name: str) -> int:
    return sum(row["cai"].get(name, 0) for row in rows)


def _counts(rows: list[dict]) -> tuple:
    ran = sum(row["cai"]["steps"] > 0 for row in rows)
    return f"{ran} of {len(rows)}", *(_total(rows, name) for name in ("kept", "replaced", *REASONS))


def _costs(rows: list[dict]) -> tuple:
    seconds = sum(v for row in rows for k, v in row["seconds"].items() if k.startswith("cai"))
    names = ("pairs", "steps", "tokens_generated", "tokens_trained")
    return *(f"{_total(rows, name):,}" for name in names), f"{seconds:.0f}"


def _changed(rows: list[dict]) -> tuple:
    notes = [row["cai"].get("notes", {}) for row in rows]
    return _total(rows, "lost"), *(sum(each.get(name, 0) for each in notes) for name in NOTES)


def _probes(by_arm) -> list[tuple]:
    by_seed = collections.defaultdict(list)
    for arm, rows in by_arm.items():
        for row in rows:
            if probes := row["cai"].get("probes"):
                text = " → ".join(f"{p['refused']:.0f}" for p in probes)
                by_seed[arm, row["seed"]].append(text)
    return [(arm, seed, ", ".join(texts)) for (arm, seed), texts in by_seed.items()]


def _asked(row: dict) -> str:
    """Returns the prompt of a record, or the whole dialogue where there is more."""
    if "messages" not in row:
        return row["prompt"]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in row["messages"])


def _pairs(run: RunData) -> list[tuple[str, str, str]]:
    """Returns answers that revision mended, from the first round that has some.

    The damage that clients did is new in that round, so these pairs show it best.
    """
    pairs: list[tuple[str, str, str]] = []
    for path in sorted((run.workdir / "cai").glob("round_*.jsonl")):
        for row in run_files.read_lines(path, run_files.OF_A_ROUND):
            pair = (_asked(row), row["initial"], row["revision"])
            if row["preferred"] and pair not in pairs:
                pairs.append(pair)
        if len(pairs) >= SHOWN:
            break
    return pairs[:SHOWN]
