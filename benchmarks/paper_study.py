"""What the paper leaves open, by its own protocol: shares, guesses and prices.

    python benchmarks/paper_study.py --study=share --config=configs/smollm.py \\
        --workdir=runs/share --config.seeds="(0,)" --config.data_dir=DATA --config.model=ALIGNED
    python benchmarks/paper_study.py --study=guess --config=configs/smollm.py \\
        --workdir=runs/guess --config.data_dir=DATA --config.model=ALIGNED \\
        --config.filter.encoder=MINILM
    python benchmarks/paper_study.py --study=price --config=configs/smollm.py \\
        --workdir=runs/smollm

`share`: does alignment survive federated training alone, with 0, 10, 30 and 50% harmful pairs;
compared with the base. `guess`: the server's guess of the harmful share (`filter.unsafe_share`) is
half of it, right, or twice it, for FL + filter; compared with the right guess. `price`: what each
defence costs in over-refusal and usefulness, and gives in refusal; of a finished run of the config,
whose workdir is given, and nothing is run.

A cell is one run in its own folder of the workdir; a study that is killed goes on with the same
command, and a finished cell is not run again. After each cell `--output` is written with all that
there are, and both tables are printed: figures with n, seeds and 95% intervals over prompts and
seeds, and differences on the same prompts and seeds. `--cells` runs some, `--only_print` none.
"""

import copy
import json
import pathlib
import shutil

from absl import app, flags, logging
from ml_collections import config_flags

import fedsafe_jax
from fedsafe_jax.runtime import provenance

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the runs.", required=True)
_STUDY = flags.DEFINE_enum("study", "share", ["share", "guess", "price"], "What is studied.")
_CELLS = flags.DEFINE_list("cells", [], "Some of the study's cells; all by default.")
_OUTPUT = flags.DEFINE_string("output", "", "File of the results; benchmarks/results by default.")
_ONLY_PRINT = flags.DEFINE_bool("only_print", False, "Run nothing, print the cells that there are.")

SHARES = (0.0, 0.1, 0.3, 0.5)
FACTORS = (0.5, 1.0, 2.0)  # of the server's guess, by the true share


def cells(study: str, config) -> dict:
    """Returns the config of every cell by its name, that which others are compared with first."""
    made = {}

    def cell(name: str, arm: str):
        made[name] = copy.deepcopy(config)
        made[name].arms, made[name].export_arm = (arm,), arm
        return made[name]

    if study == "share":
        cell("base", "base")
        for share in SHARES:
            cell(f"{100 * share:.0f}%", "fl").harmful_share = share
    if study == "guess":
        for factor in sorted(FACTORS, key=lambda x: x != 1.0):
            guess = round(factor * config.harmful_share, 6)
            if not 0 < guess < 1:
                raise app.UsageError(
                    f"harmful_share={config.harmful_share}: {factor:g} times it is {guess:g}, "
                    "which is no share between 0 and 1 that a server could guess."
                )
            cell(f"{100 * guess:.0f}%", "fl+filter").filter.unsafe_share = guess
    return made


def run_cell(folder: pathlib.Path, workdir: pathlib.Path, config) -> None:
    """Runs a cell, or goes on with it."""
    from fedsafe_jax import experiment

    # Filters are trained once: scores are known by filter and pair.
    for scores in folder.glob("*/filter_scores"):
        if scores.parent != workdir:
            shutil.copytree(scores, workdir / "filter_scores", dirs_exist_ok=True)
    experiment.run(config, str(workdir))


def outcomes_of(workdir: pathlib.Path, config) -> list[dict]:
    """Returns the outcomes of a finished cell's arm, by seed."""
    (arm,) = config.arms
    return [
        json.loads((workdir / "arms" / f"{arm}_seed{seed}.json").read_text())
        for seed in config.seeds
    ]


def seconds_of(workdir: pathlib.Path, outcomes: list[dict]) -> int:
    """Returns the seconds of all rounds and evaluations, whichever process spent them."""
    from fedsafe_jax.runtime import run_files

    rows = run_files.read_lines(workdir / "metrics.jsonl")
    spent = sum(sum(row["seconds"].values()) for row in rows)
    return round(spent + sum(outcome["seconds"] for outcome in outcomes))


def short(summary: dict) -> dict:
    """Returns a task's summary without its figures by group, judge and label."""
    left_out = ("corrected", "samples")
    return {
        name: value
        for name, value in summary.items()
        if name == "by_position" or not (name.startswith("by_") or name in left_out)
    }


def collect(folder: pathlib.Path, made: dict, sets: dict, commits: dict) -> dict:
    """Returns what is kept of the finished cells, with their differences from the first.

    Args:
      folder: folder of the cells.
      made: config by cell.
      sets: the evaluation sets by name.
      commits: commit that ran a cell, of those that are known.
    """
    from fedsafe_jax.evals import comparison
    from fedsafe_jax.pipeline import evaluation

    outcomes, kept, results_of = {}, {}, {}
    for name, config in made.items():
        if not (folder / name / "results.json").is_file():
            continue
        results_of[name] = json.loads((folder / name / "results.json").read_text())
        outcomes[name] = outcomes_of(folder / name, config)
    # A task that reads held-out pairs is left out of runs that have none.
    sets = {
        task: one for task, one in sets.items()
        if all(task in outcome for by_seed in outcomes.values() for outcome in by_seed)
    }  # fmt: skip
    for name, results in results_of.items():
        (arm,) = made[name].arms
        figures = {task: short(results["arms"][arm][task]) for task in sets}
        kept[name] = {
            "arm": arm,
            "seeds": list(made[name].seeds),
            "harmful_share_held": results["data"].get("harmful_share_held"),
            "tasks": figures,
            "seconds": seconds_of(folder / name, outcomes[name]),
            "version": fedsafe_jax.__version__,
            "commit": commits.get(name, ""),
        }
        if "filter" in results:
            kept[name]["filter"] = {k: v for k, v in results["filter"].items() if k != "per_seed"}
    first, *_ = made
    compared = {name: [first] for name in kept if name != first and first in kept}
    gaps = comparison.differences(
        sets, outcomes, compared, evaluation.options_of(next(iter(made.values())))
    )
    return {"cells": kept, "differences": gaps}


def price(folder: pathlib.Path, sets: dict) -> dict:
    """Returns what is kept of a finished run: every arm's figures, and all differences.

    Raises:
      UsageError: the run is not finished.
    """
    if not (folder / "results.json").is_file():
        raise app.UsageError(
            f"--workdir={folder}: there is no results.json; give the folder of a finished run, or "
            "finish it by `fedsafe run` with the same config."
        )
    results = json.loads((folder / "results.json").read_text())
    kept = {
        arm: {"arm": arm, "seeds": results["seeds"]}
        | {"tasks": {task: short(figures[task]) for task in sets if task in figures}}
        for arm, figures in results["arms"].items()
    }
    return {"cells": kept, "differences": results["differences"]}


def table(header: list[str], rows: list[list[str]]) -> str:
    """Returns a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tables(study: str, results: dict, sets: dict) -> str:
    """Returns the figures of all cells, and their differences, as tables in Markdown."""
    kept = results["cells"]
    columns = [
        (name, column)
        for name, one in sets.items()
        for column in one.columns
        if any(column.field in cell["tasks"].get(name, {}) for cell in kept.values())
    ]
    titles = []
    for name, column in columns:
        counts = {n for cell in kept.values() if (n := count(cell["tasks"].get(name, {}), column))}
        titles.append(f"{name}: {column.header} (n = {', '.join(map(str, sorted(counts)))})")
    rows = [
        [name, str(len(cell["seeds"]))]
        + [column.cell(cell["tasks"].get(task, {})) for task, column in columns]
        + ([quality(cell)] if study == "guess" else [])
        for name, cell in kept.items()
    ]
    more = ["filter: precision, recall"] if study == "guess" else []
    shown = ["mean (95% interval)", table([study, "seeds", *titles, *more], rows)]
    by_key = {(d["arm"], d["reference"], d["task"], d["field"]): d for d in results["differences"]}
    rows = []
    for arm, reference in dict.fromkeys(key[:2] for key in by_key):
        gaps = [by_key.get((arm, reference, task, column.field)) for task, column in columns]
        cells_ = [
            c.difference(gap) if gap else "" for (_, c), gap in zip(columns, gaps, strict=True)
        ]
        seeds = max(len(gap["per_seed"]) for gap in gaps if gap)
        rows.append([arm, reference, str(seeds), *cells_])
    if rows:
        shown.append("difference on the same items and seeds (95% interval)")
        shown.append(table([study, "less that of", "seeds", *titles], rows))
    return "\n\n".join(shown)


def count(summary: dict, column) -> int:
    """Returns the items of a figure: those at its own depth, where the task counts them apart."""
    return summary.get("n" + column.interval.removeprefix("ci95"), summary.get("n", 0))


def quality(cell: dict) -> str:
    """Returns precision and recall of a cell's filter, in percent; "" without one."""
    rates = [cell.get("filter", {}).get(name) for name in ("precision", "recall")]
    return ", ".join("n/a" if rate is None else f"{100 * rate:.1f}" for rate in rates)


def write(path: pathlib.Path, results: dict) -> None:
    """Writes the results whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(results, indent=1) + "\n")
    beside.replace(path)


def main(argv):
    del argv
    from fedsafe_jax.federated.mesh import use_cores
    from fedsafe_jax.pipeline import evaluation
    from fedsafe_jax.runtime.libraries import prepare_libraries

    study, config, folder = _STUDY.value, _CONFIG.value, pathlib.Path(_WORKDIR.value)
    output = pathlib.Path(_OUTPUT.value or f"benchmarks/results/paper_{study}.json")
    sets = evaluation.chosen_sets(config)
    if study == "price":
        results = price(folder, sets)
        write(output, {"study": study} | results)
        print(tables(study, results, sets))
        return
    made = cells(study, config)
    if unknown := set(_CELLS.value) - set(made):
        raise app.UsageError(f"--cells: {sorted(unknown)} are not of {', '.join(made)}.")
    wanted = [] if _ONLY_PRINT.value else _CELLS.value or list(made)
    left = [name for name in wanted if not (folder / name / "results.json").is_file()]
    if left:
        prepare_libraries(str(folder))
        logging.set_verbosity(logging.WARNING)
        use_cores(config.clients_per_round)
    known = json.loads(output.read_text())["cells"] if output.is_file() else {}
    commits = {name: cell.get("commit", "") for name, cell in known.items()}
    for name in left:
        run_cell(folder, folder / name, made[name])
        commits[name] = provenance.commit(provenance.PACKAGE)
        write(output, {"study": study} | collect(folder, made, sets, commits))
    results = collect(folder, made, sets, commits)
    if not results["cells"]:
        raise app.UsageError(f"--workdir={folder}: no cell is finished yet.")
    write(output, {"study": study} | results)
    print(tables(study, results, sets))


if __name__ == "__main__":
    app.run(main)
