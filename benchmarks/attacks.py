"""What malicious clients do to a federation, and what each rule against them costs without any.

    python benchmarks/attacks.py --workdir=runs/attacks

Three clients in ten are malicious, by each attacker in turn, under each rule of aggregation.
Federated training alone, without filter and CAI, on the packaged model and data. A cell is one
attacker, rule and seed; it is written to `--output` as soon as it is finished, and not run again.
Cells can be run apart (`--attackers`, `--rules`, `--seeds`), and `--only_print` prints what there
is: refusal, over-refusal and benign loss, each with the change that the attacker makes under the
same rule, on the same prompts and seeds, and its 95% interval over prompts and seeds.
"""

import json
import pathlib
import time

import numpy as np
from absl import app, flags, logging
from rich.console import Console
from rich.table import Table

import fedsafe_jax
from fedsafe_jax.config import default_config
from fedsafe_jax.evals import statistics

_WORKDIR = flags.DEFINE_string("workdir", "runs/attacks", "Folder of the runs.")
_OUTPUT = flags.DEFINE_string("output", "benchmarks/results/attacks.json", "File of all cells.")
_SHARE = flags.DEFINE_float("share", 0.3, "Malicious clients, of all.")
_ONLY_PRINT = flags.DEFINE_bool("only_print", False, "Run nothing, print the cells that there are.")

# Fields of `config.attack`. Who flips signs holds harmless pairs: it unlearns what others learn.
ATTACKERS = {
    "none": None,
    "boost 10": {"kind": "boost", "boost": 10.0},
    "data alone": {"kind": "boost", "boost": 1.0},
    "scaled": {"kind": "scaled"},
    "sign flip 10": {"kind": "sign_flip", "boost": 10.0, "harmful_share": 0.0},
}
# Fields of `config.federated`.
RULES = {
    "mean": {},
    "clipped mean": {"clip_norm": 1.0},
    "median": {"aggregator": "median"},
    "trimmed mean": {"aggregator": "trimmed_mean", "trim_share": 0.3},
    "Krum": {"aggregator": "krum", "byzantine": 3},
    "multi-Krum": {"aggregator": "multi_krum", "byzantine": 3},
    "RFA": {"aggregator": "geometric_median"},
}
# Column, field of a cell, whether it is a rate, digits.
MEASURES = (
    ("harmful refused %", "refused", True, 1),
    ("harmless refused %", "over_refused", True, 1),
    ("benign loss", "nll", False, 3),
)
_ATTACKERS = flags.DEFINE_list("attackers", list(ATTACKERS), "Attackers to run.")
_RULES = flags.DEFINE_list("rules", list(RULES), "Rules to run.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds to run.")


def cell_config(attacker: str, rule: str, seed: int, share: float):
    """The demo's sizes, with cohorts large enough for Krum."""
    c = default_config()
    c.lock()  # A field that an attacker or rule misspells is an error.
    c.seeds = (seed,)
    c.arms = ("fl",)
    c.export_arm = "fl"
    c.clients_per_round = 10
    c.examples_per_client = 30
    c.rounds = 4
    c.local_steps = 6
    c.harmful_share = 0.0
    if ATTACKERS[attacker] is not None:
        c.attack.clients = share
        for name, value in ATTACKERS[attacker].items():
            c.attack[name] = value
    c.eval.tasks = tuple(task for task in c.eval.tasks if not task.startswith("hhh"))
    c.eval.max_prompts = 60
    c.eval.max_heldout = 100
    for name, value in RULES[rule].items():
        c.federated[name] = value
    return c


def run_cell(attacker: str, rule: str, seed: int, share: float, folder: pathlib.Path) -> dict:
    """Runs a cell, or goes on with it, and returns what is kept of it."""
    from fedsafe_jax import experiment

    config, started = cell_config(attacker, rule, seed, share), time.monotonic()
    name = f"{attacker}_{rule}_{seed}_{config.attack.clients:g}".replace(" ", "-")
    workdir = folder / name
    experiment.run(config, str(workdir))
    outcome = json.loads((workdir / "arms" / f"fl_seed{seed}.json").read_text())
    lines = (workdir / "metrics.jsonl").read_text().split("\n")
    judge = "start"  # as all cells of the table
    return {
        "attacker": attacker,
        "rule": rule,
        "seed": seed,
        "share": config.attack.clients,
        "refused": digits(outcome["advbench"]["refused"][judge]),
        "over_refused": digits(outcome["over_refusal"]["refused"][judge]),
        "nll": [x and round(x, 4) for x in outcome["utility"]["nll"]],
        "update_norms": [round(json.loads(line)["update_norm"], 4) for line in lines if line],
        "seconds": round(time.monotonic() - started),
        "version": fedsafe_jax.__version__,
    }


def digits(verdicts: list[bool]) -> str:
    """Writes verdicts as a text of ones and zeros, which keeps the file short."""
    return "".join(str(int(x)) for x in verdicts)


def values(cell: dict, field: str) -> np.ndarray:
    """Reads the values of a cell, by prompt, float `[items]`; NaN where one is not defined."""
    return np.array([np.nan if x is None else float(x) for x in cell[field]])


def print_table(cells: list[dict]) -> None:
    """Prints what there is, a row for each rule and attacker."""
    table = Table(title="mean (95% interval); paired change to no attacker (95% interval)")
    for name in ("rule", "attacker", "seeds", *(m[0] for m in MEASURES), "length of a step"):
        table.add_column(name)
    for rule in RULES:
        own = {(c["attacker"], c["seed"]): c for c in cells if c["rule"] == rule}
        for attacker in ATTACKERS:
            seeds = sorted(seed for name, seed in own if name == attacker)
            if not seeds:
                continue
            found = [own[attacker, seed] for seed in seeds]
            paired = [seed for seed in seeds if ("none", seed) in own]
            shown = []
            for _, field, is_rate, places in MEASURES:
                of_seeds = [values(cell, field) for cell in found]
                middle, (low, high) = (statistics.rate if is_rate else statistics.mean)(of_seeds)
                text = f"{middle:.{places}f} ({low:.{places}f}-{high:.{places}f})"
                if attacker != "none" and paired:
                    sides = (
                        [values(own[name, s], field) for s in paired] for name in (attacker, "none")
                    )
                    change = statistics.paired(*sides, rates=is_rate)
                    gap, low, high = (f"{x:+.{places}f}" for x in (change[0], *change.ci95))
                    text += f"; {gap} ({low} to {high})"
                shown.append(text)
            length = np.mean([x for cell in found for x in cell["update_norms"]])
            table.add_row(rule, attacker, str(len(seeds)), *shown, f"{length:.2f}")
    Console(width=170).print(table)


def main(argv):
    del argv
    from fedsafe_jax.federated.mesh import use_cores
    from fedsafe_jax.runtime.libraries import prepare_libraries

    for flag, known in ((_ATTACKERS, ATTACKERS), (_RULES, RULES)):
        for name in flag.value:
            if name not in known:
                raise app.UsageError(f"--{flag.name}: '{name}' is not one of {', '.join(known)}.")
    folder, output = pathlib.Path(_WORKDIR.value), pathlib.Path(_OUTPUT.value)
    cells = json.loads(output.read_text()) if output.is_file() else []
    wanted = [
        (attacker, rule, int(seed))
        for seed in _SEEDS.value
        for attacker in _ATTACKERS.value
        for rule in _RULES.value
    ]
    done = {(c["attacker"], c["rule"], c["seed"]) for c in cells}
    left = [] if _ONLY_PRINT.value else [cell for cell in wanted if cell not in done]
    if left:
        prepare_libraries(str(folder))
        logging.set_verbosity(logging.WARNING)
        use_cores(10)
    for number, (attacker, rule, seed) in enumerate(left, 1):
        cell = run_cell(attacker, rule, seed=seed, share=_SHARE.value, folder=folder)
        cells.append(cell)
        output.parent.mkdir(parents=True, exist_ok=True)
        beside = output.with_suffix(".part")
        beside.write_text("[\n" + ",\n".join(map(json.dumps, cells)) + "\n]\n")
        beside.replace(output)
        refused = 100 * values(cell, "refused").mean()
        print(
            f"{number} of {len(left)}: {attacker}, {rule}, seed {seed}: {refused:.1f}% refused, "
            f"{cell['seconds']} s",
            flush=True,
        )
    print_table(cells)


if __name__ == "__main__":
    app.run(main)
