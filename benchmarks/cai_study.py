"""What losses and schedules of Constitutional AI do to the final model, and what they cost.

    python benchmarks/cai_study.py --study=losses --config=configs/lab.py --workdir=runs/losses \\
        --config.data_dir=DATA
    python benchmarks/cai_study.py --study=schedules --config=configs/lab.py \\
        --workdir=runs/schedules --config.data_dir=DATA

`losses` trains FL + CAI and FL + filter + CAI with each loss, `schedules` FL + CAI with each
schedule. Prints refusal, over-refusal, HHH and benign loss with 95% intervals over prompts and the
config's seeds, and per run CAI's seconds, steps, and tokens generated and trained. A cell that was
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
_STUDY = flags.DEFINE_enum("study", "losses", ["losses", "schedules"], "What is varied.")
_CELLS = flags.DEFINE_list("cells", [], "Some of the study's; all by default.")

LOSSES = {
    "sft": (("sft",), (1.0,)),
    "dpo": (("dpo",), (0.5,)),
    "sft+dpo": (("sft", "dpo"), (1.0, 0.5)),
    "derta": (("derta",), (1.0,)),
}
# Adaptive stops by itself, so it can take longer strides; light with the same is its control.
SCHEDULES = {
    "light": {},
    "final": {"schedule": "final"},
    "adaptive": {"schedule": "adaptive", "learning_rate": 2e-3, "revise": "wrong"},
    "adaptive-all": {"schedule": "adaptive", "learning_rate": 2e-3},
    "full": {"schedule": "full"},
    "light-2e-3": {"learning_rate": 2e-3},
}
MEASURES = (
    ("advbench", "safety", 1),
    ("over_refusal", "rate", 1),
    ("hhh", "accuracy", 1),
    ("utility", "nll", 3),
)


def cells(config):
    """Name and config of every cell."""
    for name in LOSSES if _STUDY.value == "losses" else SCHEDULES:
        if _CELLS.value and name not in _CELLS.value:
            continue
        c = copy.deepcopy(config)
        c.export_arm = "fl+cai"
        if _STUDY.value == "losses":
            c.arms = ("fl+cai", "fl+filter+cai")
            c.cai.losses, c.cai.weights = LOSSES[name]
        else:
            c.arms = ("fl+cai",)
            c.cai.update(SCHEDULES[name])
        yield name, c


def cost(rows, seeds: int) -> dict:
    """Of CAI, a run: seconds, steps, tokens."""
    total = dict.fromkeys(("seconds", "steps", "tokens_generated", "tokens_trained"), 0.0)
    for row in rows:
        total["seconds"] += sum(v for k, v in row["seconds"].items() if k.startswith("cai"))
        for name in ("steps", "tokens_generated", "tokens_trained"):
            total[name] += row["cai"].get(name, 0)
    return {name: value / seeds for name, value in total.items()}


def main(argv):
    del argv
    from fedsafe_jax import experiment
    from fedsafe_jax.federated.mesh import use_cores
    from fedsafe_jax.runtime import run_files
    from fedsafe_jax.runtime.libraries import prepare_libraries

    folder = pathlib.Path(_WORKDIR.value)
    prepare_libraries(str(folder))
    logging.set_verbosity(logging.WARNING)
    use_cores(_CONFIG.value.clients_per_round)
    table = Table(title="mean (95% interval); cost of CAI a run", title_justify="left")
    for name in (_STUDY.value, "arm", "harmful refused %", "harmless refused %", "HHH %"):
        table.add_column(name)
    for name in ("benign loss", "seconds", "steps", "tokens generated", "trained"):
        table.add_column(name)
    found = {}
    for name, config in cells(_CONFIG.value):
        workdir = folder / name
        if not (workdir / "results.json").is_file():
            # Filters are trained once: scores are known by filter and pair.
            for scores in folder.glob("*/filter_scores"):
                shutil.copytree(scores, workdir / "filter_scores", dirs_exist_ok=True)
            experiment.run(config, str(workdir))
        arms = json.loads((workdir / "results.json").read_text())["arms"]
        metrics = run_files.read_lines(workdir / "metrics.jsonl")
        for arm, measured in arms.items():
            spent = cost([r for r in metrics if r["arm"] == arm], len(config.seeds))
            found[f"{name}/{arm}"] = measured | {"cost": spent}
            row = []
            for task, field, digits in MEASURES:
                low, high = measured[task]["ci95"]
                value = measured[task][field]
                row.append(f"{value:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})")
            table.add_row(name, arm, *row, *(f"{v:,.0f}" for v in spent.values()))
    (folder / f"{_STUDY.value}.json").write_text(json.dumps(found, indent=1))
    Console(width=150).print(table)


if __name__ == "__main__":
    app.run(main)
