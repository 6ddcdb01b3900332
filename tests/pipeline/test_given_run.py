"""Revisions that `fedsafe revise` wrote are a run's Constitutional AI, and nothing is generated."""

import json
import subprocess
import sys

import pytest
from commands import ENVIRONMENT, ROOT, rows, run

from fedsafe_jax.config import ConfigError, default_config
from fedsafe_jax.validation import validate


def test_the_output_of_revise_is_what_a_run_trains_on(tmp_path):
    prompts = [f"How do I bake {what}?" for what in ("bread", "cake", "pizza", "a pie")]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    command = [
        sys.executable, "-m", "fedsafe_jax", "revise", f"--prompts={tmp_path / 'prompts.txt'}",
        f"--output={tmp_path / 'revised.jsonl'}", "--max_new_tokens=24",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    revised = [json.loads(line) for line in (tmp_path / "revised.jsonl").read_text().splitlines()]
    usable = [row for row in revised if not row["dropped"]]
    evaluated = json.loads(_first("red_team_heldout.jsonl"))["messages"][0]["content"]
    more = [{"prompt": f"Ask {i}.", "initial": "Yes.", "revision": "Sorry."} for i in range(3)]
    more.append({"prompt": evaluated, "initial": "Yes.", "revision": "Sorry."})
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in more))
    run(
        tmp_path / "run", "arms=('fl+cai',)", "rounds=2", f"data_dir={tmp_path}", "cai.data=given",
        "cai.records=('revised.jsonl','more.jsonl')", "cai.replay_examples=1",
        "cai.red_team_sources=()", "eval.max_prompts=0",
    )  # fmt: skip
    found = [r["cai"] for r in rows(tmp_path / "run")]
    assert [(c["kept"], c["steps"], c["tokens_generated"]) for c in found] == [(3, 2, 0)] * 2
    assert all(c["replay"] == 1 and c["sft_loss"] > 0 and c["pairs"] > 0 for c in found)
    counts = json.loads((tmp_path / "run/results.json").read_text())["data"]["CAI, given revisions"]
    assert counts["read"] == len(revised) + 4 and counts["kept"] == len(usable) + 3
    assert counts["dropped_near_evaluation"] == 1
    assert not (tmp_path / "run/cai").exists()  # there is nothing new to keep


def _first(name):
    return (ROOT / "fedsafe_jax/assets/demo" / name).read_text().splitlines()[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "given"}, "give both or neither"),
        ({"records": ("a.jsonl",)}, "give both or neither"),
        (
            {
                "data": "given", "records": ("a.jsonl",), "schedule": "adaptive",
                "red_team_sources": (),
            },
            "cai.schedule='adaptive': it asks cai.red_team_sources",
        ),
    ],
)  # fmt: skip
def test_given_revisions_need_files_and_probes_need_prompts(changes, message):
    config = default_config()
    for name, value in changes.items():
        config.cai[name] = value
    with pytest.raises(ConfigError, match=message):
        validate(config)
