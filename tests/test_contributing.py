"""The worked examples of CONTRIBUTING.md run as they stand there."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

from fedsafe_jax import evals
from fedsafe_jax.config import default_config
from fedsafe_jax.federated import algorithms
from fedsafe_jax.validation import validate

TEXT = (pathlib.Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_the_algorithm_takes_nesterov_steps(monkeypatch):
    names: dict = {}
    monkeypatch.setitem(algorithms.ALGORITHMS, "fednag", None)  # Leaves with the test.
    exec(CODE[0], names)
    config = default_config()
    config.algorithms = ("fednag",)
    validate(config)
    assert algorithms.make("fednag", None, 4).server_update
    method = names["fednag"](None, rate=0.5, momentum=0.9)
    server = method.init({"a": jnp.zeros(2)})
    delta, trace, expected = np.array([1.0, -2.0]), np.zeros(2), np.zeros(2)
    for _ in range(3):
        server = method.server_update(server, {"a": jnp.asarray(delta)}, ())
        trace = -delta + 0.9 * trace
        expected += -0.5 * (-delta + 0.9 * trace)
    np.testing.assert_allclose(server.factors["a"], expected, rtol=1e-6)
    assert jax.tree.leaves(server.optimizer)


def test_the_evaluation_counts_and_gives_an_interval(monkeypatch, tmp_path):
    monkeypatch.setitem(evals.TASKS, "help", None)  # Leaves with the test.
    exec(CODE[1], {})
    task = evals.TASKS["help"]

    class Model:
        def generate(self, prompts, **options):
            return ["Call a helpline.", "No.", "See a doctor.", "No."]

    (tmp_path / "help.txt").write_text("a\nb\nc\nd\n")
    items = task.load("prompts:help.txt", str(tmp_path))
    outcome = task.run(Model(), items, evals.EvalOptions())
    assert outcome == {"helped": [True, False, True, False]}
    summary = task.summarise([outcome], evals.EvalOptions())
    low, high = summary["ci95"]
    assert summary["helped"] == 50 and low < 50 < high
    config = default_config()
    config.eval.tasks = ("help",)
    validate(config)


def test_the_family_is_a_row_that_exists():
    from families import FAMILIES as TESTED

    from fedsafe_jax.models.decoder_config import FAMILIES

    for code, table in ((CODE[2], FAMILIES), (CODE[3], TESTED)):
        copy = dict(table)
        exec(code, {"FAMILIES": copy})
        assert copy == dict(table)
