"""The report's section on who did it: the harm of each client's update, and how it ranks them."""

import collections

from fedsafe_jax.filters.quality import shown
from fedsafe_jax.report.blocks import COLOURS, Section, Table, Text, figure
from fedsafe_jax.report.run_data import RunData

MOST = 10  # clients of each arm that the table shows; results.json has all
NOTE = (
    "Each client's update alone, as the server received it, on the model of the round's start, "
    "asked the server's own red-team prompts: how much less it refuses than that model, and how "
    "far its first tokens are from that model's (KL divergence in nats). Means over the client's "
    "rounds; lengths and divergences also as multiples of the round's median. Who refuses less is "
    "not thereby malicious: harmless data can cost refusal too."
)
RANKED = (
    "How well each figure, as a mean over a client's rounds, ranks the malicious clients first: "
    "area under the ROC curve, 1 where all of them come first, 0.5 for chance, with its 95% "
    "interval over clients and seeds; by round among the clients of that round."
)
TITLES = {
    "refusal_lost": "refusal lost",
    "divergence": "divergence / median",
    "norm": "length / median",
    "cosine": "cosine to the mean, least first",
    "flagged": "share of pairs flagged",
}


def sections(run: RunData) -> list[Section]:
    """Returns the clients that did most harm, a figure of all (`attribution.png`), and how well
    each signal ranks malicious ones; nothing without `federated.attribution`."""
    arms = {
        arm: summary
        for arm, summary in run.results.get("attribution", {}).items()
        if summary["clients"]
    }
    if not arms:
        return []
    known = any("signals" in summary for summary in arms.values())
    blocks = [
        Text(NOTE + (" Crosses are malicious clients." if known else "")),
        figure(run.figures / "attribution.png", lambda plt: _scatter(plt, arms)),
        Table(*_clients(arms)),
    ]
    if known:
        blocks += [Text(RANKED), Table(*_ranking(arms))]
    return [Section("Who did it", blocks)]


def _clients(arms: dict[str, dict]) -> tuple[tuple, list]:
    """Returns header and rows of the clients of each arm whose updates lost most refusal."""
    table = []
    filtered = any("kept" in line for summary in arms.values() for line in summary["clients"])
    for arm, summary in arms.items():
        worst = sorted(
            summary["clients"], key=lambda line: (-line["refusal_lost"], -(line["divergence"] or 0))
        )
        for line in worst[:MOST]:
            name = f"{line['client']} (malicious)" if line.get("malicious") else line["client"]
            cells = (
                f"{line['refused']:.1f}",
                f"{line['refusal_lost']:+.1f}",
                shown(line["divergence"], 3),
                shown(line["relative_divergence"], 2),
                shown(line["relative_norm"], 2),
                shown(line["cosine"], 2),
            )
            counts = ("",)
            if "kept" in line:
                counts = (f"{line['flagged']:.0f} of {line['flagged'] + line['kept']:.0f}",)
            table.append(
                (arm, name, line["seed"], line["rounds"], *cells, *(counts if filtered else ()))
            )
    header = (
        *("arm", "client", "seed", "rounds", "refused %", "refusal lost, points"),
        *("divergence", "/ median", "length / median", "cosine"),
        *(("pairs flagged",) if filtered else ()),
    )
    return header, table


def _ranking(arms: dict[str, dict]) -> tuple[tuple, list]:
    """Returns header and rows of the AUROC of each signal."""
    rows = []
    for arm, summary in arms.items():
        for name, ranked in summary.get("signals", {}).items():
            area = shown(ranked["auroc"], 3)
            if ranked["auroc"] is not None:
                low, high = ranked["ci95"]
                area += f" ({low:.3f}-{high:.3f})"
            by_round = ", ".join(shown(value, 2) for value in ranked["by_round"])
            rows.append((arm, TITLES[name], area, by_round))
    return ("arm", "signal", "AUROC", "by round"), rows


def _scatter(plt, arms: dict[str, dict]):
    drawing, axis = plt.subplots(figsize=(7, 3.6))
    for i, (arm, summary) in enumerate(arms.items()):
        groups = collections.defaultdict(list)
        for line in summary["clients"]:
            if line["relative_divergence"]:
                point = (line["relative_divergence"], line["refusal_lost"])
                groups[bool(line.get("malicious"))].append(point)
        for bad, points in sorted(groups.items()):
            axis.scatter(
                *zip(*points, strict=True),
                s=18,
                marker="x" if bad else "o",
                color=COLOURS[(i + 1) % len(COLOURS)],
                label=arm + (", malicious" if bad else ""),
            )
    axis.set_xscale("log")
    axis.set_xlabel("divergence of first tokens / median of the round")
    axis.set_ylabel("refusal lost, points")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return drawing
