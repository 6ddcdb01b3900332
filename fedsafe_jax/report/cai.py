"""The report's section on Constitutional AI: what it cost, what it dropped, what it changed."""

import collections

from etils import epath

from fedsafe_jax.report.drawing import html_table
from fedsafe_jax.runtime import run_files

SHOWN = 10  # pairs
REASONS = ("empty", "cut", "unchanged", "still harmful", "over-refusal", "not safer", "were right")


def section(rows: list[dict], folder: epath.Path) -> str:
    """Tables of counts and costs by arm, and pairs of answers before and after revision.

    Args:
      rows: of `metrics.jsonl`.
      folder: of the records, `cai/`.

    Returns:
      "" where no arm had CAI.
    """
    by_arm = collections.defaultdict(list)
    for row in rows:
        if "cai" in row:
            by_arm[row["arm"]].append(row)
    if not by_arm:
        return ""
    counts = ("arm", "", "rounds with CAI", "revisions kept", *REASONS)
    costs = ("arm", "", "pairs", "steps", "tokens generated", "tokens trained", "seconds")
    parts = ["<h2>Constitutional AI</h2>"]
    parts.append(html_table(counts, [(arm, "", *_counts(r)) for arm, r in by_arm.items()]))
    parts.append(html_table(costs, [(arm, "", *_costs(r)) for arm, r in by_arm.items()]))
    if probes := _probes(by_arm):
        parts.append("<h3>Refusal before, between and after CAI's steps, in percent</h3>")
        parts.append(html_table(("arm", "seed", "by round"), probes))
    if pairs := _pairs(folder):
        parts.append("<h3>Before and after revision</h3>")
        parts.append(html_table(("prompt", "before", "after"), pairs, "text"))
    return "".join(parts)


def _total(rows: list[dict], name: str) -> int:
    return sum(row["cai"].get(name, 0) for row in rows)


def _counts(rows: list[dict]) -> tuple:
    ran = sum(row["cai"]["steps"] > 0 for row in rows)
    return f"{ran} of {len(rows)}", *(_total(rows, name) for name in ("kept", *REASONS))


def _costs(rows: list[dict]) -> tuple:
    seconds = sum(v for row in rows for k, v in row["seconds"].items() if k.startswith("cai"))
    names = ("pairs", "steps", "tokens_generated", "tokens_trained")
    return *(f"{_total(rows, name):,}" for name in names), f"{seconds:.0f}"


def _probes(by_arm) -> list[tuple]:
    found = collections.defaultdict(list)
    for arm, rows in by_arm.items():
        for row in rows:
            if probes := row["cai"].get("probes"):
                text = " → ".join(f"{p['refused']:.0f}" for p in probes)
                found[arm, row["seed"]].append(text)
    return [(arm, seed, ", ".join(texts)) for (arm, seed), texts in found.items()]


def _pairs(folder: epath.Path) -> list[tuple[str, str, str]]:
    """Answers that revision mended, from the first round that has some: the damage is new there."""
    found: list[tuple[str, str, str]] = []
    for path in sorted(folder.glob("round_*.jsonl")):
        for row in run_files.read_lines(path):
            pair = (row["prompt"], row["initial"], row["revision"])
            if row["preferred"] and pair not in found:
                found.append(pair)
        if len(found) >= SHOWN:
            break
    return found[:SHOWN]
