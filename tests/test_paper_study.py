"""`benchmarks/paper_study.py`: which cells are run, what is kept, that a killed study goes on."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# Runs the study in the place of `python benchmarks/paper_study.py`, each run being what it would
# leave in its workdir: every fourth request answered, and more at a share or guess of 0.3.
STUB = """
import json, pathlib, runpy, sys
from fedsafe_jax import experiment
from fedsafe_jax.pipeline import evaluation

def run(config, workdir):
    folder, (arm,) = pathlib.Path(workdir), config.arms
    setting = config.filter.unsafe_share if "filter" in arm else config.harmful_share
    began = folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / "calls.txt", "a") as file:
        file.write(f"{folder.name} {arm} {setting}\\n")
    if setting == 0.6 and not began:
        sys.exit("killed")
    answered = 2 if setting == 0.3 and arm != "base" else 4
    refused = {"start": [i % answered != 0 for i in range(12)]}
    outcome = {name: {"refused": refused} for name in ("advbench", "over_refusal")}
    outcome |= {"utility": {"nll": [1.0 + setting, 2.0]}, "seconds": 2.0}
    (folder / "arms").mkdir()
    for seed in config.seeds:
        (folder / "arms" / f"{arm}_seed{seed}.json").write_text(json.dumps(outcome))
    (folder / "metrics.jsonl").write_text(json.dumps({"seconds": {"federated": 3.0}}) + "\\n")
    sets = evaluation.chosen_sets(config)
    options = evaluation.options_of(config)
    summary = evaluation.summarise(sets, [outcome] * len(config.seeds), options)
    results = {"arms": {arm: summary}, "data": {"harmful_share_held": [setting]}}
    if "filter" in arm:
        results["filter"] = {"precision": 0.5, "recall": None, "per_seed": []}
    (folder / "results.json").write_text(json.dumps(results))

experiment.run = run
runpy.run_path("benchmarks/paper_study.py", run_name="__main__")
"""


@pytest.fixture
def study(tmp_path):
    (tmp_path / "small.py").write_text(
        "from fedsafe_jax.config import default_config\n\n\n"
        "def get_config():\n"
        "    c = default_config()\n"
        "    c.seeds, c.eval.judges = (0, 1), ('start',)\n"
        "    c.eval.tasks = ('advbench', 'over_refusal', 'utility')\n"
        "    return c\n"
    )

    def run(name, *flags):
        return subprocess.run(
            [sys.executable, "-c", STUB, f"--study={name}", f"--config={tmp_path / 'small.py'}",
             f"--workdir={tmp_path / name}", f"--output={tmp_path / name}.json", *flags],
            cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        )  # fmt: skip

    return run


def test_shares_are_run_once_each_and_compared_with_the_base(study, tmp_path):
    done = study("share")
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "share" / "calls.txt").read_text().splitlines()
    assert calls == ["base base 0.3", "0% fl 0.0", "10% fl 0.1", "30% fl 0.3", "50% fl 0.5"]
    kept = json.loads((tmp_path / "share.json").read_text())
    assert list(kept["cells"]) == ["base", "0%", "10%", "30%", "50%"]
    cell = kept["cells"]["30%"]
    assert cell["tasks"]["advbench"]["safety"] == 50 and cell["tasks"]["advbench"]["n"] == 12
    assert cell["seconds"] == 3 + 2 * 2 and cell["seeds"] == [0, 1] and cell["commit"]
    gaps = {(d["arm"], d["field"]): d for d in kept["differences"]}
    assert gaps["30%", "safety"]["difference"] == pytest.approx(-25)
    assert gaps["50%", "nll"]["difference"] == pytest.approx(0.1)
    assert {d["reference"] for d in kept["differences"]} == {"base"}
    assert "advbench: AdvBench refused % \u2191 (n = 12)" in done.stdout
    assert "| 30% | 2 | 50.0 (" in done.stdout and "| 30% | base | 2 | -25.0 (" in done.stdout


def test_a_study_that_ended_early_keeps_what_it_has(study, tmp_path):
    done = study("guess")
    assert done.returncode and "killed" in done.stderr
    calls = (tmp_path / "guess" / "calls.txt").read_text().splitlines()
    assert calls == ["30% fl+filter 0.3", "15% fl+filter 0.15", "60% fl+filter 0.6"]
    kept = json.loads((tmp_path / "guess.json").read_text())
    assert list(kept["cells"]) == ["30%", "15%"]
    assert kept["cells"]["15%"]["filter"] == {"precision": 0.5, "recall": None}
    done = study("guess")  # what is finished is not run again
    assert done.returncode == 0, done.stderr
    again = (tmp_path / "guess" / "calls.txt").read_text().splitlines()
    assert again == [*calls, "60% fl+filter 0.6"]
    assert "| 15% | 30% | 2 | +25.0 (" in done.stdout and "| 50.0, n/a |" in done.stdout
    finished = json.loads((tmp_path / "guess.json").read_text())
    assert list(finished["cells"]) == ["30%", "15%", "60%"]
    assert finished["cells"]["15%"] == kept["cells"]["15%"]


def test_the_price_is_read_from_a_finished_run(study, tmp_path):
    done = study("price")
    assert done.returncode and "there is no results.json" in done.stderr
    figures = {"safety": 80.0, "ci95": [70.0, 88.0], "n": 60, "by_judge": {}}
    gap = {"task": "advbench", "field": "safety", "difference": 30.0, "ci95": [20.0, 40.0]}
    gap |= {"arm": "fl+cai", "reference": "fl", "n": 60, "per_seed": [30.0], "p": 0.1}
    results = {"arms": {"fl": {"advbench": figures}, "fl+cai": {"advbench": figures}}}
    (tmp_path / "price").mkdir(exist_ok=True)
    (tmp_path / "price" / "results.json").write_text(
        json.dumps(results | {"seeds": [0], "differences": [gap]})
    )
    done = study("price")
    assert done.returncode == 0, done.stderr
    assert "| fl+cai | fl | 1 | +30.0 (+20.0, +40.0) |" in done.stdout
    kept = json.loads((tmp_path / "price.json").read_text())
    assert "by_judge" not in kept["cells"]["fl"]["tasks"]["advbench"]
