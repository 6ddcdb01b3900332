"""The report's section on the safety filter: confusion, reliability, categories."""

import collections

from fedsafe_jax.filters.decision import AT_BOUND
from fedsafe_jax.filters.quality import shown
from fedsafe_jax.report.blocks import COLOURS, Section, Table, Text, figure
from fedsafe_jax.report.run_data import RunData

RATES = ("accuracy", "precision", "recall", "hmean")


def sections(run: RunData) -> list[Section]:
    """Returns the filter's rates, confusion, reliability and categories.

    The reliability diagram is written to `reliability.png`.
    """
    if "filter" not in run.results:
        return []
    quality = run.results["filter"]
    seeds = quality["per_seed"]
    rates = ", ".join(f"{name} {shown(quality[name])}" for name in RATES)
    counts = ("true_positive", "false_negative", "false_positive", "true_negative")
    rows = [
        (f"run {i}", f"{q['threshold']:.2f}", *(q[name] for name in counts), _error(q))
        for i, q in enumerate(seeds)
    ]
    header = ("", "threshold", "unsafe flagged", "unsafe kept", "safe flagged", "safe kept")
    diagonal = "On the diagonal, a predicted probability is the share of pairs that are unsafe."
    blocks = [
        Text(f"{rates}, AUROC {shown(quality['auroc'], 3)}", note=False),
        Table((*header, "calibration error"), rows),
        Text(diagonal),
        figure(run.figures / "reliability.png", lambda plt: _reliability(plt, seeds)),
        _categories(seeds),
    ]
    if any("rejected" in q for q in seeds):
        blocks.append(_rejected(seeds))
    bounded = [i for i, q in enumerate(seeds) if q.get("calibration_at_bound")]
    if bounded:
        blocks.insert(1, Text(f"Run {', '.join(map(str, bounded))}: {AT_BOUND}.", note=False))
    return [Section("Safety filter", blocks)]


def _categories(seeds: list[dict]) -> Table:
    """Returns how many pairs of each of the largest categories were flagged."""
    categories: dict = {}
    for q in seeds:
        for name, (flagged, seen) in q["categories"].items():
            before = categories.get(name, (0, 0))
            categories[name] = (before[0] + flagged, before[1] + seen)
    rows = [
        (name or "none", "", flagged, seen, f"{100 * flagged / seen:.0f}%")
        for name, (flagged, seen) in sorted(categories.items(), key=lambda c: -c[1][0])[:20]
    ]
    return Table(("category", "", "flagged", "pairs", "share"), rows)


def _rejected(seeds: list[dict]) -> Table:
    """Returns how many new answers to flagged pairs were not taken, by reason."""
    total: collections.Counter = sum(
        (collections.Counter(q.get("rejected", {})) for q in seeds), collections.Counter()
    )
    return Table(
        ("new answer not taken", "", "pairs"), [(n, "", k) for n, k in total.most_common()]
    )


def _error(q: dict) -> str:
    return f"{q['reliability']['error']:.3f}"


def _reliability(plt, seeds):
    drawing, axis = plt.subplots(figsize=(4.6, 3.6))
    axis.plot([0, 1], [0, 1], color="#bbb", linewidth=1)
    for i, q in enumerate(seeds):
        bins = q["reliability"]
        sizes = [10 + 120 * n / sum(bins["counts"]) for n in bins["counts"]]
        colour = COLOURS[(i + 1) % len(COLOURS)]
        axis.plot(bins["predicted"], bins["observed"], color=colour, linewidth=1)
        axis.scatter(bins["predicted"], bins["observed"], s=sizes, color=colour, label=f"run {i}")
    axis.set_xlabel("predicted P(unsafe)")
    axis.set_ylabel("share unsafe")
    axis.legend(fontsize=8)
    return drawing
