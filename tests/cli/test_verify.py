"""`fedsafe verify` on a real run: its checkpoints, and a tail that only they remember."""

import json
import shutil

import pytest

from fedsafe_jax.cli import startup


def verify(workdir, capsys):
    """Runs the command; returns its code and what it printed."""
    capsys.readouterr()
    try:
        startup.start("verify", [str(workdir)])
        code = 0
    except SystemExit as end:
        code = end.code
    return code, capsys.readouterr().out


def test_a_run_matches_its_ledger_with_all_of_its_checkpoints(kept, capsys):
    code, out = verify(kept, capsys)
    assert code == 0 and out.endswith("matches its ledger; 2 chains, 3 rounds, 3 checkpoints\n")
    lines = [json.loads(line) for line in (kept / "ledger.jsonl").read_text().splitlines()]
    assert [(row["arm"], row["round"]) for row in lines] == [
        ("base", 0), *(("fl", t) for t in range(5))
    ]  # fmt: skip
    metrics = [json.loads(line) for line in (kept / "metrics.jsonl").read_text().splitlines()]
    for row, line in zip(metrics, lines[1:4], strict=True):
        assert sorted(map(str, row["clients"])) == sorted(line["clients"])
        assert line["updates"].keys() == {"start", *line["clients"]}
    results = json.loads((kept / "results.json").read_text())
    assert lines[3]["after"] == results["arms"]["fl"]["adapter_sha256"][0]
    assert set(lines[5]["export"]) >= {"adapter/adapter_model.safetensors", "merged/config.json"}


@pytest.mark.parametrize("damage", ["another checkpoint", "damaged checkpoint", "cut everywhere"])
def test_checkpoints_and_ledger_know_each_other(kept, tmp_path, capsys, damage):
    workdir = tmp_path / "copy"
    shutil.copytree(kept, workdir)
    folder = workdir / "checkpoints" / "fl" / "seed0"
    if damage == "another checkpoint":
        shutil.rmtree(folder / "2")
        shutil.copytree(folder / "1", folder / "2")
        wanted = "checkpoints: fl seed 0 round 2: holds another adapter than the round gave"
    elif damage == "damaged checkpoint":
        for path in (folder / "3" / "default").rglob("*"):
            if path.is_file():
                path.write_bytes(b"")
        wanted = "checkpoints: fl seed 0 round 3: cannot be read"
    else:  # as if the last round had never been: the checkpoint alone is left of it
        for name in ("ledger.jsonl", "metrics.jsonl"):
            lines = (workdir / name).read_text().splitlines(keepends=True)
            (workdir / name).write_text("".join(lines[: 3 - (name == "metrics.jsonl")]))
        for name in ("results.json", "arms/fl_seed0.json"):
            (workdir / name).unlink()
        shutil.rmtree(workdir / "export")
        shutil.rmtree(workdir / "updates" / "fl" / "seed0" / "round_3")
        wanted = "ledger.jsonl: fl seed 0 has no line of round 2, whose checkpoint is there"
    code, out = verify(workdir, capsys)
    assert code == 1 and out.splitlines()[0].startswith(wanted)
    assert out.splitlines()[1].startswith(f"{workdir}: 1 finding(s); 2 chains")


def test_without_the_base_model_the_rest_is_checked(kept, tmp_path, capsys):
    workdir = tmp_path / "copy"
    shutil.copytree(kept, workdir)
    config = (workdir / "config.json").read_text()
    (workdir / "config.json").write_text(config.replace("package:model", "/gone/model"))
    code, out = verify(workdir, capsys)
    assert code == 1 and out.startswith("config.json: ")
    assert "checkpoints: fl seed 0 round 3: cannot be read (model '/gone/model'" in out
