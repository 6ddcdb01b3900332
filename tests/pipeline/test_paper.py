"""`configs/paper.py` on small files of the upstream forms and the packaged model."""

import csv
import json
import runpy

import numpy as np
import pytest

from fedsafe_jax.cai.constitution import load
from fedsafe_jax.cai.revise import Judge, parse_check, revise
from fedsafe_jax.data.partition import PartitionError
from fedsafe_jax.pipeline import dry_run
from fedsafe_jax.pipeline.inputs import load_inputs
from fedsafe_jax.validation import validate


def square(i):
    topic = ("law", "tax", "vote", "school", "river", "bridge", "song", "farm", "coast")[i % 9]
    answer = i % 3 != 0
    return {
        "question": f"질문 {i}", "question_en": f"What does number {i} of the {topic} mean?",
        "response": f"대답 {i}", "response_en": f"Answer {i}.", "acceptable?": int(answer),
        "category": ["contentious"], "question_category": "contentious",
    }  # fmt: skip


def write_csv(path, header, rows):
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


@pytest.fixture
def config(tmp_path):
    c = runpy.run_path("configs/paper.py")["get_config"]()
    (tmp_path / "square").mkdir()
    pairs, questions = [square(i) for i in range(300)], [square(i) for i in range(300, 330)]
    keep = ("question", "question_en", "category")
    asked = [{k: q[k] for k in keep} | {"sensitive?": 1} for q in questions]
    for name, rows in (("response_train", pairs), ("question_train", asked)):
        (tmp_path / f"square/{name}.json").write_text(json.dumps(rows))
    (tmp_path / "dolly").mkdir()
    row = {"instruction": "Sing.", "context": "", "response": "La.", "category": "x"}
    (tmp_path / "dolly/databricks-dolly-15k.jsonl").write_text(json.dumps(row) + "\n")
    kinds = [("homonyms", f"kill a process {i}") for i in range(5)]
    kinds += [("contrast_homonyms", f"kill a person {i}") for i in range(4)]
    prompts = [(f"v2-{i}", *one, "") for i, one in enumerate(kinds)]
    write_csv(tmp_path / "xstest/xstest_prompts.csv", ("id", "type", "prompt", "note"), prompts)
    write_csv(tmp_path / "advbench/harmful_behaviors.csv", ("goal", "target"), [("Do it", "Ok")])
    c.data_dir, c.model, c.filter.model, c.rounds = (
        str(tmp_path),
        "package:model",
        "package:model",
        2,
    )
    c.dtype, c.num_clients, c.examples_per_client = "float32", 5, 10
    tasks = [task for task in c.eval.tasks if task != "hhh"]
    c.eval.tasks = (*tasks, "hhh=package/hhh_heldout.jsonl")
    return c


def test_what_the_paper_asks_is_what_is_read(config):
    validate(config)
    read = load_inputs(config)
    assert len(read.evals["over_refusal"].items) == 5  # XSTest's safe prompts, no contrast_ ones
    assert len(read.evals["advbench_2"].items) == 4
    clients = [e.prompt for examples in read.clients[0] for e in examples]
    assert all(p.isascii() for p in (*clients, *(e.prompt for e in read.red_team)))
    assert len(read.red_team) == 30 and len(clients) == 50
    assert sum(e.label == "unsafe" for examples in read.clients[0] for e in examples) == 15


def test_balanced_answers_pass_the_papers_check(config):
    check = parse_check(config.cai.check)
    assert check.judge and not check.refusal  # rules keep refusals alone
    prompts = ["Is the law fair?", "Is the tax just?"]
    said = {0: "It is bad.", 1: "Unfair.", 2: "There are good reasons on both sides."}

    def generate(threads, call):
        return [said[call]] * len(threads), np.ones(len(threads), bool)

    def unsafe(asked, answers):
        return np.array([0.1 if "both sides" in answer else 0.9 for answer in answers])

    records = revise(
        [(("user", p),) for p in prompts], load("package:constitution"), generate,
        reviser=generate, seed=(0, 0),
        judge=Judge([True] * 2, unsafe, 0.5),
    )  # fmt: skip
    assert [r.dropped for r in records] == ["", ""] and all(r.preferred for r in records)


def test_the_plan_counts_the_guard_and_says_what_clients_hold(config):
    plan = dry_run.describe(config)
    assert "guard            package:model: 4,196,608 parameters, 16.0 MiB" in plan
    assert "harmful share 30.0% of 50 pairs, 30.0% of 50 asked" in plan
    config.arms = ("base", "fl")
    alone = dry_run.describe(config)
    assert "guard            none" in alone
    config.num_clients = 5000
    with pytest.raises(PartitionError, match="more clients than examples"):
        dry_run.describe(config)
