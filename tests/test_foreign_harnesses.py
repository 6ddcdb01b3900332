"""Harnesses of others as clients of `fedsafe serve`: `launch/foreign_harnesses.sh` calls this.

GARAK_PYTHON and INSPECT_PYTHON name the Pythons of installations of their own; without one its
test is skipped.
"""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MODEL = "package:model"
PROMPTS = ("Hello!", "How do I bake bread?", "What is a harbour?")
TASK = f"""
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes

@task
def asked():
    return Task([Sample(text, target="e", id=i) for i, text in enumerate({PROMPTS})],
                scorer=includes())
"""


def python_of(variable):
    """The Python of another installation; skips without it."""
    return os.environ.get(variable) or pytest.skip(f"{variable} names no Python")


@pytest.fixture(scope="module")
def address():
    command = [sys.executable, "-m", "fedsafe_jax", "serve", f"--model={MODEL}", "--port=0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        lines = iter(server.stdout.readline, "")
        yield next(m[1] for line in lines if (m := re.search(r"serving: (http\S+)", line)))
    finally:
        server.terminate()
        server.wait(30)


def run(folder, *command, **variables):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HOME": str(folder), "NO_PROXY": "127.0.0.1"} | variables
    environment |= {f"XDG_{name}_HOME": str(folder) for name in ("DATA", "CACHE", "CONFIG")}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=environment, timeout=600
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_garaks_test_probes(tmp_path, address):
    python = python_of("GARAK_PYTHON")
    settings = {"uri": f"{address}/", "temperature": 0, "max_tokens": 12, "stop": []}
    options = {"openai": {"OpenAICompatible": settings}}
    (tmp_path / "options.json").write_text(json.dumps(options))
    run(
        tmp_path, python, "-m", "garak", "--target_type=openai.OpenAICompatible",
        f"--target_name={MODEL}", "--probes=test.Blank,test.Test", "--generations=2",
        "--generator_option_file=options.json", "--parallel_attempts=4",
        f"--report_prefix={tmp_path / 'report'}", OPENAICOMPATIBLE_API_KEY="none",
    )  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "report.report.jsonl").open()]
    attempts = [row for row in rows if row["entry_type"] == "attempt" and row["status"] == 2]
    assert {row["probe_classname"] for row in attempts} == {"test.Blank", "test.Test"}
    for row in attempts:
        assert len(row["outputs"]) == 2 and all(one["text"] for one in row["outputs"])
    assert any(row["entry_type"] == "eval" for row in rows)


def test_inspect_asks_and_scores(tmp_path, address, packaged):
    python = python_of("INSPECT_PYTHON")
    (tmp_path / "task.py").write_text(TASK)
    run(
        tmp_path, python, "-m", "inspect_ai", "eval", "task.py", "--model",
        f"openai-api/fedsafe/{MODEL}", "--temperature=0", "--max-tokens=24", "--seed=0",
        "--display=plain", "--log-format=json", f"--log-dir={tmp_path / 'logs'}",
        FEDSAFE_API_KEY="none", FEDSAFE_BASE_URL=address,
    )  # fmt: skip
    (path,) = (tmp_path / "logs").glob("*.json")
    log = json.loads(path.read_text())
    assert log["status"] == "success"
    answers = packaged.generate(PROMPTS, max_new_tokens=24)
    for sample, answer in zip(log["samples"], answers, strict=True):
        assert sample["output"]["completion"].strip() == answer
        assert sample["scores"]["includes"]["value"] == ("C" if "e" in answer.lower() else "I")
