"""The report's section on the safety filter: confusion, reliability, categories."""

from etils import epath

from fedsafe_jax.report.drawing import COLOURS, figure_tag, html_table

RATES = ("accuracy", "precision", "recall", "hmean")


def section(quality: dict, figures: epath.Path) -> str:
    """HTML of the section; its figure is written to `reliability.png`.

    Args:
      quality: `results["filter"]`.
      figures: folder.
    """
    seeds = quality["per_seed"]
    rates = ", ".join(f"{name} {quality[name]:.1f}" for name in RATES)
    counts = ("true_positive", "false_negative", "false_positive", "true_negative")
    rows = [
        (f"run {i}", f"{q['threshold']:.2f}", *(q[name] for name in counts), _error(q))
        for i, q in enumerate(seeds)
    ]
    header = ("", "threshold", "unsafe flagged", "unsafe kept", "safe flagged", "safe kept")
    parts = [
        f"<h2>Safety filter</h2><p>{rates}, AUROC {quality['auroc']:.3f}</p>",
        html_table((*header, "calibration error"), rows),
        '<p class="note">On the diagonal, a predicted probability is the share of pairs that are '
        "unsafe.</p>",
        figure_tag(figures / "reliability.png", lambda plt: _reliability(plt, seeds)),
    ]
    categories: dict = {}
    for q in seeds:
        for name, (flagged, seen) in q["categories"].items():
            before = categories.get(name, (0, 0))
            categories[name] = (before[0] + flagged, before[1] + seen)
    table = [
        (name or "none", "", flagged, seen, f"{100 * flagged / seen:.0f}%")
        for name, (flagged, seen) in sorted(categories.items(), key=lambda c: -c[1][0])[:20]
    ]
    parts.append(html_table(("category", "", "flagged", "pairs", "share"), table))
    return "".join(parts)


def _error(q: dict) -> str:
    return f"{q['reliability']['error']:.3f}"


def _reliability(plt, seeds):
    figure, axis = plt.subplots(figsize=(4.6, 3.6))
    axis.plot([0, 1], [0, 1], color="#bbb", linewidth=1)
    for i, q in enumerate(seeds):
        found = q["reliability"]
        sizes = [10 + 120 * n / sum(found["counts"]) for n in found["counts"]]
        colour = COLOURS[(i + 1) % len(COLOURS)]
        axis.plot(found["predicted"], found["observed"], color=colour, linewidth=1)
        axis.scatter(found["predicted"], found["observed"], s=sizes, color=colour, label=f"run {i}")
    axis.set_xlabel("predicted P(unsafe)")
    axis.set_ylabel("share unsafe")
    axis.legend(fontsize=8)
    return figure
