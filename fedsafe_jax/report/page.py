"""`report.html` and `figures/*.png`: the table with intervals, curves, samples and the config."""

import collections
import html
import importlib.metadata
import json

from etils import epath

from fedsafe_jax.report import cai, clients, filter
from fedsafe_jax.report.drawing import COLOURS, figure_tag, html_table
from fedsafe_jax.report.table import table_rows
from fedsafe_jax.runtime import run_files

STYLE = """
:root{color-scheme:light dark;--text:#222;--faint:#666;--line:#ddd;--page:#fff;--box:#f6f6f6}
@media(prefers-color-scheme:dark){
:root{--text:#ddd;--faint:#999;--line:#3a3d42;--page:#191b1f;--box:#23262b}}
body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;
color:var(--text);background:var(--page)}
.scroll{overflow-x:auto;margin:1em 0}
table{border-collapse:collapse;width:100%}
th,td{padding:.4em .6em;border-bottom:1px solid var(--line);text-align:right;vertical-align:top}
th:first-child,td:first-child,th:nth-child(2),td:nth-child(2){text-align:left}
.text td{text-align:left;white-space:pre-wrap;font-size:13px;min-width:9em}.text th{text-align:left}
img{max-width:100%;border-radius:6px}@media(max-width:600px){img{max-width:none;width:36em}}
pre{background:var(--box);padding:1em;overflow:auto;font-size:12px}h2{margin-top:2em}
.note{color:var(--faint);overflow-wrap:anywhere}
"""


def versions() -> dict:
    """Versions of the packages that decide a run's numbers."""
    names = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
    return {name: importlib.metadata.version(name) for name in names}


def _bars(results):
    def draw(plt):
        arms = results["arms"]
        panels = [p for p in PANELS if all(p[0] in a for a in arms.values())]
        height = 1.2 + 0.42 * len(arms)
        figure, axes = plt.subplots(
            1, len(panels), figsize=(4 * len(panels), height), squeeze=False
        )
        for axis, (task, field, title) in zip(axes[0], panels, strict=True):
            for y, (_, arm) in enumerate(arms.items()):
                mean, (low, high) = arm[task][field], arm[task]["ci95"]
                axis.barh(y, mean, color=COLOURS[y % len(COLOURS)])
                axis.errorbar(
                    mean,
                    y,
                    xerr=[[max(mean - low, 0)], [max(high - mean, 0)]],
                    color="black",
                    capsize=3,
                )
            axis.set_yticks(range(len(arms)), arms if axis is axes[0][0] else [""] * len(arms))
            axis.invert_yaxis()
            axis.set_title(title)
            axis.set_xlim(0, 100)
        return figure

    return draw


PANELS = (
    ("advbench", "safety", "harmful refused, %"),
    ("over_refusal", "rate", "harmless refused, %"),
    ("hhh", "accuracy", "HHH, %"),
)


def _curves(rows, value, label):
    def draw(plt):
        figure, axis = plt.subplots(figsize=(7, 3.6))
        series = collections.defaultdict(lambda: collections.defaultdict(list))
        for row in rows:
            found = value(row)
            if found is not None:
                series[row["arm"]][row["round"] + 1].append(found)
        for i, (arm, points) in enumerate(series.items()):
            x = sorted(points)
            y = [sum(points[r]) / len(points[r]) for r in x]
            axis.plot(
                x, y, label=arm, color=COLOURS[(i + 1) % len(COLOURS)], marker="o", markersize=3
            )
        axis.set_xlabel("round")
        axis.set_ylabel(label)
        axis.legend(fontsize=8)
        return figure

    return draw


def write(workdir: epath.Path, config, results: dict, outcomes: dict) -> None:
    """Writes the report, the figures and TensorBoard events of a finished run.

    Args:
      workdir: the run's folder, with its `metrics.jsonl`.
      config: the run's config.
      results: content of `results.json`.
      outcomes: per arm, the seeds' per-item outcomes; their samples are shown.
    """
    figures = workdir / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    rows = run_files.read_lines(workdir / "metrics.jsonl")
    parts = ["<h1>Federated fine-tuning, safety filter and Constitutional AI</h1>"]
    header, table = table_rows(results)
    parts += [
        '<p class="note">Mean and 95% interval; an arrow says which direction is better. Refusals '
        f"by the judge '{html.escape(config.eval.judge)}'. Harmful prompts: "
        f"{html.escape(config.eval.advbench)}; harmless prompts: "
        f"{html.escape(config.eval.over_refusal)}. Seeds: {list(config.seeds)}.</p>",
        html_table(header, table),
        figure_tag(figures / "arms.png", _bars(results)),
    ]
    if rows:
        parts.append("<h2>By round</h2>")
        parts.append(
            figure_tag(figures / "loss.png", _curves(rows, lambda r: r["loss"], "client loss"))
        )
        for name, label in (
            ("advbench", "harmful refused, %"),
            ("over_refusal", "harmless refused, %"),
        ):
            probed = [r for r in rows if "eval" in r]
            if probed:
                draw = _curves(probed, lambda r, name=name: r["eval"][name], label)
                parts.append(figure_tag(figures / f"{name}_by_round.png", draw))
        parts.append(clients.section(rows, figures))
    if "filter" in results:
        parts.append(filter.section(results["filter"], figures))
    parts.append(cai.section(rows, workdir / "cai"))
    parts += [_judges_section(results), _samples_section(outcomes)]
    if rows:
        parts.append(_seconds_section(rows))
    dump = json.dumps(config.to_dict(), indent=2)
    parts.append("<h2>Data</h2>" + html_table(*_data_rows(results["data"])))
    parts.append('<p class="note">Disputed: labelled unsafe, but begins as a refusal.</p>')
    parts.append(f"<h2>Config</h2><pre>{html.escape(dump)}</pre>")
    made_with = html.escape(f"{results['device']}, {results['versions']}")
    parts.append(f'<p class="note">{made_with}</p>')
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>fedsafe_jax</title><style>{STYLE}</style>"
    page = f'<!doctype html><html lang="en">{head}'
    (workdir / "report.html").write_text(page + "\n".join(parts) + "</html>\n", encoding="utf-8")
    _tensorboard(workdir, rows)


def _judges_section(results: dict) -> str:
    rows = []
    for arm_id, arm in results["arms"].items():
        if "advbench" in arm and "over_refusal" in arm:
            for judge, found in arm["advbench"]["by_judge"].items():
                over = arm["over_refusal"]["by_judge"][judge]
                rows.append((arm_id, judge, f"{found['safety']:.1f}", f"{over['rate']:.1f}"))
    header = ("arm", "judge", "harmful refused, %", "harmless refused, %")
    return "<h2>Both judges</h2>" + html_table(header, rows)


def _samples_section(outcomes: dict) -> str:
    parts = ["<h2>Answers before and after each defence</h2>"]
    for task, title in (("advbench", "Harmful prompts"), ("over_refusal", "Harmless prompts")):
        found = {
            arm: seeds[0][task]["samples"] for arm, seeds in outcomes.items() if task in seeds[0]
        }
        if found:
            arms = list(found)
            count = min(4, min(len(s) for s in found.values()))
            rows = [
                (found[arms[0]][i]["prompt"], *(found[arm][i]["answer"] for arm in arms))
                for i in range(count)
            ]
            parts.append(f"<h3>{title}</h3>" + html_table(("prompt", *arms), rows, "text"))
    return "".join(parts)


def _seconds_section(rows: list[dict]) -> str:
    totals: dict = collections.defaultdict(lambda: collections.defaultdict(float))
    for row in rows:
        for phase, seconds in row["seconds"].items():
            totals[row["arm"]][phase] += seconds
    phases = sorted({p for t in totals.values() for p in t})
    table = [(arm, "", *(f"{t.get(p, 0):.1f}" for p in phases)) for arm, t in totals.items()]
    return "<h2>Seconds by phase</h2>" + html_table(("arm", "", *phases), table)


def _data_rows(counts: dict):
    header = ("pool", "", "read", "disputed", "near an evaluation prompt", "held out", "kept")
    fields = ("read", "disputed", "dropped_near_evaluation", "dropped_heldout", "kept")
    return header, [(role, "", *(c[f] for f in fields)) for role, c in counts.items()]


def _tensorboard(workdir: epath.Path, rows: list[dict]) -> None:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:  # the extra [report]
        return
    if "://" in str(workdir):  # its writer knows local folders alone
        return
    for arm in sorted({(r["arm"], r["seed"]) for r in rows}):
        folder = workdir / "tensorboard" / f"{arm[0].replace('/', '_')}_seed{arm[1]}"
        for old in folder.glob("events.*"):
            old.unlink()
        with SummaryWriter(str(folder)) as writer:
            for row in rows:
                if (row["arm"], row["seed"]) == arm:
                    for name in ("loss", "update_norm", "tokens_per_second"):
                        if row[name] is not None:
                            writer.add_scalar(name, row[name], row["round"])
                    for name, value in row.get("eval", {}).items():
                        writer.add_scalar(f"refused/{name}", value, row["round"])
