"""What a filter's recall, and what is done with flagged pairs, do to the final model.

    python benchmarks/filter_study.py --study=recall --config=configs/demo.py --workdir=runs/recall
    python benchmarks/filter_study.py --study=actions --config=configs/lab.py \\
        --workdir=runs/actions --config.data_dir=DATA

`recall` trains FL + filter with a simulated filter of recall 0 to 100% at `--precision`, and draws
`recall.png`; `actions` trains it with each action of the configured filter. Prints refusal,
over-refusal and benign loss with 95% intervals over prompts and the config's seeds. A cell that was
finished is not run again.
"""

import copy
import json
import pathlib
import shutil

from absl import app, flags, logging
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the runs.", required=True)
_STUDY = flags.DEFINE_enum("study", "recall", ["recall", "actions"], "What is varied.")
_PRECISION = flags.DEFINE_float("precision", 0.9, "Of the simulated filter.")

RECALLS = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
MEASURES = (("advbench", "safety", 1), ("over_refusal", "rate", 1), ("utility", "nll", 3))


def cells(config):
    """Name and config of every cell."""
    from fedsafe_jax.filters.actions import ACTIONS

    for value in RECALLS if _STUDY.value == "recall" else ACTIONS:
        c = copy.deepcopy(config)
        c.arms, c.export_arm = ("fl+filter",), "fl+filter"
        if _STUDY.value == "recall":
            c.filter.kind = "simulated"
            c.filter.simulated_recall, c.filter.simulated_precision = value, _PRECISION.value
            yield f"{100 * value:.0f}", c
        else:
            c.filter.action = value
            yield value, c


def draw(names, arms, path):
    """Safety over recall, with intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5.2, 3.6))
    x = [float(n) for n in names]
    for task, field, label, colour in (
        ("advbench", "safety", "harmful refused", "#2a9d5c"),
        ("over_refusal", "rate", "harmless refused", "#d1495b"),
    ):
        y = [a[task][field] for a in arms]
        low, high = zip(*(a[task]["ci95"] for a in arms), strict=True)
        axis.plot(x, y, marker="o", color=colour, label=label)
        axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    axis.set_xlabel("recall of the filter, %")
    axis.set_ylabel("%")
    axis.set_ylim(0, 100)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(argv):
    del argv
    from fedsafe_jax import experiment
    from fedsafe_jax.federated.mesh import use_cores
    from fedsafe_jax.runtime.libraries import prepare_libraries

    folder = pathlib.Path(_WORKDIR.value)
    prepare_libraries(str(folder))
    logging.set_verbosity(logging.WARNING)
    use_cores(_CONFIG.value.clients_per_round)
    table = Table(title="mean (95% interval)", title_justify="left")
    for name in (_STUDY.value, "harmful refused %", "harmless refused %", "benign loss"):
        table.add_column(name)
    names, found = [], []
    for name, config in cells(_CONFIG.value):
        workdir = folder / name
        if not (workdir / "results.json").is_file():
            # Filters are trained once: scores are known by filter and pair.
            for scores in folder.glob("*/filter_scores"):
                shutil.copytree(scores, workdir / "filter_scores", dirs_exist_ok=True)
            experiment.run(config, str(workdir))
        arm = json.loads((workdir / "results.json").read_text())["arms"]["fl+filter"]
        names.append(name)
        found.append(arm)
        row = []
        for task, field, digits in MEASURES:
            low, high = arm[task]["ci95"]
            row.append(f"{arm[task][field]:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})")
        table.add_row(name, *row)
    results = dict(zip(names, found, strict=True))
    (folder / f"{_STUDY.value}.json").write_text(json.dumps(results, indent=1))
    if _STUDY.value == "recall":
        draw(names, found, folder / "recall.png")
    Console(width=110).print(table)


if __name__ == "__main__":
    app.run(main)
