"""An evaluation, an algorithm and an aggregator of one file each show in everything of a run."""

import importlib
import json
import pathlib
import shutil
import subprocess
import sys

import pytest
from commands import ENVIRONMENT

from fedsafe_jax import evals, experiment
from fedsafe_jax.cli import startup
from fedsafe_jax.config import default_config
from fedsafe_jax.evals.task import TaskError, load_items, select
from fedsafe_jax.federated import aggregation, algorithms
from fedsafe_jax.report.table import print_workdir

TOYS = ("evals/toy_task.py", "federated/toy_algorithm.py", "federated/toy_aggregator.py")
REGISTRIES = (evals.TASKS, algorithms.ALGORITHMS, aggregation.AGGREGATORS)
HERE = pathlib.Path(__file__).parent
CONFIG = """
import toy_aggregator
import toy_algorithm
import toy_task

from fedsafe_jax.config import default_config


def get_config():
    c = default_config()
    c.algorithms = ("toy_unit",)
    c.eval.tasks = ("toy", "utility")
    return c
"""


def fedsafe(folder, *arguments):
    """Runs a command as a user does, in a folder of the user's."""
    return subprocess.run(
        [sys.executable, "-m", "fedsafe_jax", *arguments],
        cwd=folder, env=ENVIRONMENT | {"PYTHONPATH": str(HERE.parent)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def toys():
    """Imports the toy files, which register themselves; forgets them at the end."""
    before = [dict(registry) for registry in REGISTRIES]
    with pytest.MonkeyPatch.context() as patch:
        for file in map(pathlib.Path, TOYS):
            patch.syspath_prepend(HERE / file.parent)
            sys.modules.pop(file.stem, None)
            importlib.import_module(file.stem)
        yield
    for registry, old in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(old)


@pytest.fixture(scope="module")
def workdir(toys, tmp_path_factory):
    """Workdir of a run with all three toys, of one round and two clients."""
    c = default_config()
    c.algorithms, c.federated.aggregator = ("toy_unit",), "toy_midrange"
    c.arms, c.export_arm = ("base", "fl"), "fl"
    c.rounds = c.local_steps = 1
    c.num_clients = c.clients_per_round = c.batch_size = 2
    c.examples_per_client = 4
    c.eval.tasks = ("toy", "toy=chat:package/clients_safe.jsonl#heldout", "utility")
    c.eval.max_prompts, c.eval.max_heldout, c.eval.max_new_tokens = 4, 2, 4
    c.eval.every_round_prompts = 2
    folder = tmp_path_factory.mktemp("toys")
    experiment.run(c, str(folder))
    return folder


def test_the_toys_are_small():
    for file in TOYS:
        assert len((HERE / file).read_text().splitlines()) <= 60


def test_the_task_is_in_the_results_under_a_name_for_each_source(workdir):
    results = json.loads((workdir / "results.json").read_text())
    fl = results["arms"]["fl"]
    assert fl["algorithm"] == "toy_unit"
    for name in ("toy", "toy_2"):
        low, high = fl[name]["ci95"]
        assert 0 <= low <= fl[name]["spoken"] <= high <= 100
    compared = {(d["arm"], d["reference"], d["task"], d["field"]) for d in results["differences"]}
    assert ("fl", "base", "toy_2", "spoken") in compared
    assert results["sources"]["toy_2"].endswith("#heldout")
    assert results["versions"]["tasks"] == {"toy": 1, "toy_2": 1, "utility": 2}
    (row,) = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    assert row["eval"].keys() == {"toy", "toy_2", "utility"}
    # The server's step has the length of its learning rate, whatever the clients sent.
    assert row["update_norm"] == pytest.approx(default_config().federated.adaptive_learning_rate)


def test_the_task_is_in_the_report_the_figures_and_the_card(workdir):
    report = (workdir / "report.html").read_text()
    # Once in the table of the arms, and once in that of their differences, told apart by name.
    for name in ("toy", "toy_2"):
        assert report.count(f"said something ({name}) % \u2191") == 2
    assert "toy prompts" in report
    assert (workdir / "figures/toy_by_round.png").is_file()
    card = (workdir / "export/adapter/README.md").read_text()
    assert "| said something (toy), % |" in card and "| said something (toy_2), % |" in card


def test_the_task_is_in_the_printed_table(workdir, capsys):
    results = json.loads((workdir / "results.json").read_text())
    print_workdir(str(workdir))
    shown = capsys.readouterr().out
    assert "said" in shown and f"{results['arms']['fl']['toy']['spoken']:.1f}" in shown


def test_the_task_is_evaluated_by_its_name(toys, capsys, tmp_path):
    output = tmp_path / "out.json"
    arguments = ["--tasks=toy", "--max_prompts=3", "--max_new_tokens=4", f"--output={output}"]
    startup.start("evaluate", arguments)
    assert "toy: said something, %: " in capsys.readouterr().out
    result = json.loads(output.read_text())
    assert len(result["outcomes"]["toy"]["spoke"]) == 3
    startup.start("evaluate", ["--help"])
    assert "toy" in capsys.readouterr().out


def test_a_config_imports_what_lies_beside_it(tmp_path):
    for file in TOYS:
        shutil.copy(HERE / file, tmp_path)
    (tmp_path / "mine.py").write_text(CONFIG)
    flags = ["--config.dry_run", "--config.federated.aggregator=toy_midrange"]
    done = fedsafe(tmp_path, "run", "--config=mine.py", *flags)
    assert done.returncode == 0 and "evaluation       toy, " in done.stdout, done.stderr
    assert "toy_unit" in done.stdout and "eval.tasks, federated.aggregator" in done.stdout
    small = ["--max_prompts=2", "--max_new_tokens=2"]
    done = fedsafe(tmp_path, "evaluate", "--register=toy_task.py", "--tasks=toy", *small)
    assert done.returncode == 0 and "toy: said something" in done.stdout, done.stderr
    done = fedsafe(tmp_path, "evaluate", "--register=none.py", "--tasks=toy")
    assert done.stderr == "error: --register=none.py: no such file.\n" and done.returncode == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "other"}, "the task calls itself 'other'"),
        ({"columns": ()}, "needs at least one column"),
        ({"columns": (evals.Column("t", "f", "higher"),)}, "better='higher'; expected up or down"),
    ],
)
def test_mistakes_in_a_task_are_found_before_any_compute(toys, monkeypatch, changes, message):
    monkeypatch.setitem(evals.TASKS, "toy", evals.TASKS["toy"]._replace(**changes))
    with pytest.raises(TaskError, match=message):
        select(("toy",), evals.TASKS)


def test_a_set_without_items_is_an_error(toys):
    empty = evals.TASKS["toy"]._replace(load=lambda source, data_dir: [])
    with pytest.raises(TaskError, match="'toy': x holds no item"):
        load_items("toy", evals.EvalSet(empty, "x"), "", 0)
