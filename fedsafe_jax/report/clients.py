"""The report's section on clients: who pulled the model, who was left out, what was sent."""

import collections
import statistics

from fedsafe_jax.report.blocks import COLOURS, Section, Table, Text, figure
from fedsafe_jax.report.run_data import RunData


def sections(run: RunData) -> list[Section]:
    """Returns every client's pull on the model; the scatter is written to `clients.png`."""
    rows = [row for row in run.rows if "clients" in row]
    if not rows:
        return []
    crosses = " Crosses are malicious clients." if any(r.get("malicious") for r in rows) else ""
    note = (
        "A point is a client in a round: the length of its update, as a multiple of the round's "
        "median, and its angle to the mean of all. Long updates pull hardest; a negative cosine "
        f"pulls against the others.{crosses}"
    )
    blocks = [
        Text(note),
        figure(run.figures / "clients.png", lambda plt: _scatter(plt, rows)),
        Table(*_longest(rows)),
        Table(*_totals(rows)),
    ]
    if "privacy" in run.results:
        blocks.append(Text(run.results["privacy"]["statement"]))
    return [Section("Clients", blocks)]


def _points(rows: list[dict]):
    """Yields `(arm, client, length / median, cosine, malicious)` of each client and round."""
    for row in rows:
        bad = set(row.get("malicious", ()))
        points = zip(row["clients"], row["delta_norms"], row["cosines"], strict=True)
        # Figures that were not finite are null.
        defined = [point for point in points if None not in point]
        middle = statistics.median([norm for _, norm, _ in defined] or [0]) or 1.0
        for client, norm, cosine in defined:
            yield row["arm"], client, norm / middle, cosine, client in bad


def _scatter(plt, rows: list[dict]):
    drawing, axis = plt.subplots(figsize=(7, 3.6))
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    points = list(_points(rows))
    for i, arm in enumerate(arms):
        for bad, marker in ((False, "o"), (True, "x")):
            mine = [(n, c) for a, _, n, c, b in points if a == arm and b == bad and n > 0]
            if mine:
                axis.scatter(
                    *zip(*mine, strict=True),
                    s=16,
                    marker=marker,
                    color=COLOURS[(i + 1) % len(COLOURS)],
                    label=arm + (", malicious" if bad else ""),
                )
    if any(n > 3 for _, _, n, _, _ in points):
        axis.set_xscale("log")
    axis.set_xlabel("length of the update / median of the round")
    axis.set_ylabel("cosine to the mean")
    if axis.get_legend_handles_labels()[0]:  # none where every update was left out
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return drawing


def _longest(rows: list[dict]) -> tuple[tuple, list]:
    """Returns header and rows of the three clients with the longest updates of each arm."""
    by_arm = collections.defaultdict(lambda: collections.defaultdict(list))
    for arm, client, norm, cosine, bad in _points(rows):
        by_arm[arm][client].append((norm, cosine, bad))
    table = []
    for arm, clients in by_arm.items():
        middle = {c: statistics.median(n for n, _, _ in seen) for c, seen in clients.items()}
        for client in sorted(middle, key=middle.get, reverse=True)[:3]:
            seen = clients[client]
            cosine = statistics.median(c for _, c, _ in seen)
            name = f"{client} (malicious)" if seen[0][2] else str(client)
            table.append((arm, name, len(seen), f"{middle[client]:.3g}", f"{cosine:.2f}"))
    return ("arm", "longest updates: client", "rounds", "length / median", "cosine"), table


def _totals(rows: list[dict]) -> tuple[tuple, list]:
    """Returns header and rows of what each arm sent, and which clients it left out."""
    table = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == arm]

        def total(name, mine=mine):
            return sum(len(row.get(name, ())) for row in mine)

        up, down = (sum(row[f"bytes_{way}"] for row in mine) / 2**20 for way in ("up", "down"))
        epsilon = f"{mine[-1]['epsilon']:.2f}" if "epsilon" in mine[-1] else "none"
        gaps = [row["product_gap"] for row in mine if row["product_gap"] is not None]
        gap = f"{100 * statistics.median(gaps):.1f}" if gaps else ""
        left_out = (total("excluded"), total("dropped_out"), total("no_data"))
        skipped = sum(row["skipped"] for row in mine)
        table.append((arm, f"{up:.1f}", f"{down:.1f}", *left_out, skipped, gap, epsilon))
    header = ("arm", "MiB up", "MiB down", "not finite", "dropped out", "without data")
    return (*header, "rounds skipped", "product gap, %", "epsilon (of the arm)"), table
