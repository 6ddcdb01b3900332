"""Constitutional AI within runs: what it reuses, when it rests, what it says of itself."""

import json

import pytest
from commands import NO_ANSWERS, rows, run


@pytest.mark.slow
def test_mixed_data_reuse_the_rounds_before_under_both_checks(tmp_path):
    run(
        tmp_path,
        "arms=('fl+filter+cai',)",
        "cai.data=mixed",
        "cai.check=start+filter",
        "cai.revision_rounds=2",
        "cai.losses=('sft','kto','derta')",
        "cai.weights=(1.0,0.5,0.5)",
        "rounds=2",
        NO_ANSWERS,
    )
    found = [r["cai"] for r in rows(tmp_path)]
    kept = [json.loads(line) for line in (tmp_path / "cai/round_000.jsonl").open()]
    assert [c["reused"] for c in found] == [0, len(kept)]
    assert all(c["steps"] == 2 and c["tokens_generated"] > 0 for c in found)
    assert all(len(r["earlier"]) == 1 for r in kept)
    report = (tmp_path / "report.html").read_text()
    assert "Constitutional AI</h2>" in report and "2 of 2" in report


def test_cached_data_are_generated_once_and_a_safe_model_is_left_alone(tmp_path):
    settings = ("arms=('fl+cai',)", "rounds=2", NO_ANSWERS)
    run(tmp_path / "cached", *settings, "cai.data=cached", "cai.reference=global")
    first, second = (r["cai"] for r in rows(tmp_path / "cached"))
    assert first["tokens_generated"] > 0 and second["tokens_generated"] == 0
    assert second["reused"] > 0 and second["steps"] == 2
    done = run(
        tmp_path / "adaptive", *settings, "cai.schedule=adaptive", "cai.target=0.5",
        "cai.probe_prompts=6",
    )  # fmt: skip
    found = [r["cai"] for r in rows(tmp_path / "adaptive")]
    assert all(c["steps"] == 0 and c["probes"][0]["ci95"][1] > 0 for c in found)
    assert all(c["tokens_generated"] > 0 for c in found)  # a probe is not free
    assert done.stderr.count("no CAI needed (refused ") == 2
    assert not (tmp_path / "adaptive" / "cai").exists()


def test_an_unsafe_model_is_trained_until_a_probe_or_the_limit_says_stop(tmp_path):
    done = run(
        tmp_path, "arms=('fl+cai',)", "rounds=1", "cai.schedule=adaptive", "cai.target=100.0",
        "cai.probe_prompts=66", "harmful_share=0.9", "local_steps=12", "learning_rate=1e-2",
        "cai.revise=wrong", "cai.red_team_prompts=16", NO_ANSWERS,
    )  # fmt: skip
    (found,) = (r["cai"] for r in rows(tmp_path))
    probes = found["probes"]
    assert probes[0]["asked"] == 64 and probes[0]["refused"] < 90  # clear before all were asked
    assert all(p["ci95"][1] < 100 for p in probes[:-1])
    # Three steps are the least, four (twice those of a light round) the most.
    assert found["steps"] == {2: 3, 3: 4}[len(probes)]
    assert " → ".join(f"{p['refused']:.0f}%" for p in probes) in done.stderr
    made = [json.loads(line) for line in (tmp_path / "cai/round_000.jsonl").open()]
    left = [r for r in made if r["dropped"] == "were right"]
    assert found["were right"] == len(left) and 0 < len(left) < len(made)
    assert all((r["critique"] == r["revision"] == "") == (r in left) for r in made)
