"""The ledger of a run: what it covers, that nothing in it can change, and that it goes on."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from etils import epath
from ledger_run import clients_of, files_of, findings, finished, lived, row_of

from fedsafe_jax import whole_files
from fedsafe_jax.cli import startup
from fedsafe_jax.data.chat import Encoded
from fedsafe_jax.pipeline import ledger_lines
from fedsafe_jax.runtime import checkpoint, ledger, ledger_check, run_files
from fedsafe_jax.whole_files import WorkdirError


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = epath.Path(tmp_path_factory.mktemp("whole"))
    finished(workdir)
    return workdir


def test_a_finished_run_matches_and_its_ledger_has_no_time_in_it(whole, tmp_path):
    assert findings(whole) == []
    (tmp_path / "again").mkdir()
    finished(epath.Path(tmp_path / "again"), seconds=2.0)
    again = (tmp_path / "again" / ledger.NAME).read_bytes()
    assert again == (whole / ledger.NAME).read_bytes()
    lines = ledger.read(whole)
    assert [row["round"] for row in lines] == [0, 1, 2, 3, 0, 1, 2, 3, 4]
    first = lines[0]
    assert first["clients"].keys() == {"0"} and first["updates"].keys() == {"start", "0"}
    assert first["clients"]["0"].keys() == {"pairs", "kept", "filter"}


def test_each_flipped_byte_is_found(whole, tmp_path):
    """Every byte of the ledger and of what it covers, but those of seconds."""
    top = pathlib.Path(whole)
    names = [p.relative_to(top) for p in top.rglob("*") if p.is_file()]
    assert len(names) > 15
    rng = np.random.default_rng(0)
    workdir = epath.Path(tmp_path) / "copy"
    shutil.copytree(whole, workdir)
    for name in names:
        content = (whole / name).read_bytes()
        places = rng.choice(len(content), min(len(content), 6), replace=False)
        for place in places:
            around = content[max(0, place - 40) : place + 40]
            if b"seconds" in around or name.name == "inputs.json":
                continue
            flipped = bytearray(content)
            flipped[place] ^= 1 << int(rng.integers(8))
            (workdir / name).write_bytes(bytes(flipped))
            assert findings(workdir), (name, place)
        (workdir / name).write_bytes(content)
    assert findings(workdir) == []


@pytest.mark.parametrize("value", [None, [1], {"0": 7}, 7, "x"])
def test_a_field_of_another_kind_is_a_finding_and_no_crash(whole, tmp_path, value):
    """What another program may have written: each line as this project would write it."""
    workdir = epath.Path(tmp_path) / "copy"
    shutil.copytree(whole, workdir)
    for number, field in ((1, "clients"), (1, "updates"), (8, "export")):
        rows = ledger.read(whole)
        rows[number][field] = value
        (workdir / ledger.NAME).write_bytes(whole_files.to_json_lines(rows))
        assert findings(workdir), field
        if field == "clients":
            chain = ledger.ArmLedger(workdir, rows[1]["arm"], 0)
            with pytest.raises(WorkdirError, match="line of round 1: damaged"):
                chain.go_on(3, "adapter3")
    shutil.copy(whole / ledger.NAME, workdir / ledger.NAME)
    results = json.loads((whole / "results.json").read_text())
    arm = results["ledger"]["heads"]["fl+filter+cai"]
    for place, field in ((results, "ledger"), (results["ledger"], "heads"), (arm, "0")):
        kept, place[field] = place[field], value
        run_files.write_json(workdir / "results.json", results)
        assert any("results.json: " in said for said in findings(workdir)), field
        place[field] = kept


def test_a_missing_line_shifts_no_checkpoint(whole, monkeypatch):
    monkeypatch.setattr(checkpoint, "rounds_of", lambda folder: [1, 2, 3])
    left = ledger_check.checkpoints(whole, ledger.read(whole)[1:4])
    assert [found[1:] for found in left] == [(2, "adapter2"), (3, "adapter3")]


def test_a_cut_tail_is_found_wherever_it_was_cut(whole, tmp_path):
    lines = (whole / ledger.NAME).read_bytes().splitlines(keepends=True)
    rows = ledger.read(whole)
    workdir = epath.Path(tmp_path) / "copy"
    shutil.copytree(whole, workdir)
    for left in range(len(lines)):
        (workdir / ledger.NAME).write_bytes(b"".join(lines[:left]))
        assert findings(workdir), left
    (workdir / ledger.NAME).write_bytes(b"".join(lines)[:-5])
    assert any("cut off" in said for said in findings(workdir))
    # In the middle of a chain, and the first line of one.
    for gone in (1, 0):
        kept = [line for line, row in zip(lines, rows, strict=True) if row["round"] != gone]
        (workdir / ledger.NAME).write_bytes(b"".join(kept))
        assert any("lines are missing" in said for said in findings(workdir))


def test_a_forged_line_breaks_the_chain_and_the_anchors(whole, tmp_path):
    workdir = epath.Path(tmp_path) / "copy"
    shutil.copytree(whole, workdir)
    rows = ledger.read(workdir)
    rows[0]["after"] = rows[1]["before"] = "another"
    (workdir / ledger.NAME).write_bytes(whole_files.to_json_lines(rows))
    said = "\n".join(findings(workdir))
    assert "not the one that it was written behind" in said and "metrics.jsonl names" in said
    # Chained anew, the lines are still not those that metrics and results name.
    for chain in ledger.by_arm(rows).values():
        for one, other in zip(chain, chain[1:], strict=False):
            other["previous"] = ledger.line_hash(one)
    (workdir / ledger.NAME).write_bytes(whole_files.to_json_lines(rows))
    said = "\n".join(findings(workdir))
    assert "not the one that it was written behind" not in said
    assert "metrics.jsonl names" in said and "does not lead to the line that results.json" in said


def test_what_is_gone_or_beside_the_ledger_is_named(whole, tmp_path):
    for gone, message in (
        ("metrics.jsonl", "metrics.jsonl: no row of fl+filter+cai seed 0 round 0"),
        ("results.json", "results.json: not there"),
        ("export/adapter.bin", "export/adapter.bin: not there"),
        ("cai/round_001.jsonl", "cai/round_001.jsonl: the records of fl+filter+cai seed 0"),
        ("arms/fl+filter+cai_seed1.json", "arms/fl+filter+cai_seed1.json: not there"),
        ("updates/fl+filter+cai/seed0/round_2/client_1.safetensors", "the update of client 1"),
        ("config.json", "config.json: 8 line(s) name another one"),
        ("inputs.json", "inputs.json: 8 line(s) name another one"),
    ):
        workdir = epath.Path(tmp_path) / gone.replace("/", "_")
        shutil.copytree(whole, workdir)
        (workdir / gone).unlink()
        assert any(message in said for said in findings(workdir)), (gone, findings(workdir))
    (workdir / "export" / "more.bin").write_bytes(b"")
    assert any("export/more.bin: no line" in said for said in findings(workdir))


def test_a_repeated_round_leaves_one_line_and_the_same_end(whole, tmp_path):
    workdir = epath.Path(tmp_path)
    lived(workdir, last=2, loss=5.0)  # killed before the checkpoint of its second round
    before = ledger.read(workdir)
    lived(workdir, first=1)
    rows = ledger.read(workdir)
    assert [row["round"] for row in rows] == [0, 1, 2, 3] and rows[0] == before[0]
    assert rows[1] != before[1] and findings(workdir) == []
    lived(workdir)  # from the start again, to the lines of a run that nobody disturbed
    assert ledger.read(workdir) == ledger.read(whole)[:4]


def test_nothing_is_written_behind_a_ledger_that_does_not_lead_there(whole, tmp_path):
    workdir = epath.Path(tmp_path)
    lived(workdir, last=2)
    content = (workdir / ledger.NAME).read_bytes()
    files, c = files_of(workdir)
    lines = ledger_lines.ArmLines(c, clients_of(), files)
    for text, adapter, message in (
        (content.splitlines(keepends=True)[0], "adapter2", "it ends after 1 of 2 rounds"),
        (b"", "adapter2", "it ends after 0 of 2 rounds"),
        (content, "other", "another adapter than the newest checkpoint"),
        (content.replace(b'"after": "adapter1"', b'"after": "adapterX"'), "adapter2", "round 1"),
    ):
        (workdir / ledger.NAME).write_bytes(text)
        with pytest.raises(WorkdirError, match=message) as caught:
            lines.go_on(2, adapter)
        assert "fedsafe verify" in str(caught.value) and "\n" not in str(caught.value)
        assert (workdir / ledger.NAME).read_bytes() == text


def test_other_pairs_and_other_verdicts_after_a_resume_are_found(tmp_path, monkeypatch):
    """Before anything is trained on them; and in a run that went on all the same."""
    for name, members in (
        ("pairs", clients_of(last_token=4)),
        ("filter", clients_of(flagged=False)),
    ):
        workdir = epath.Path(tmp_path) / name
        workdir.mkdir()
        lived(workdir, last=2, members=members)
        files, c = files_of(workdir)
        lines = ledger_lines.ArmLines(c, clients_of(), files)
        with pytest.raises(WorkdirError, match=f"{name} of client 1 are others than in round 2"):
            lines.go_on(2, "adapter2")
        with monkeypatch.context() as patch:
            patch.setattr(ledger, "_other_pairs", lambda chain, held: "")
            lines.go_on(2, "adapter2")
        row = lines.add_round(row_of(files, 2), [], [0, 1], "adapter3")
        files.record(row, [])
        assert any(f"{name} of client 1 have changed" in said for said in findings(workdir))


def test_the_command_prints_a_line_each_and_ends_with_a_code(whole, tmp_path, capsys):
    startup.start("verify", [str(whole), "--heads"])
    out = capsys.readouterr().out
    assert "matches its ledger; 2 chains, 6 rounds, 0 checkpoints" in out
    end = json.loads((whole / "results.json").read_text())["ledger"]["heads"]
    assert end["fl+filter+cai"]["1"]["sha256"] in out
    workdir = tmp_path / "copy"
    shutil.copytree(whole, workdir)
    (workdir / "export" / "adapter.bin").write_bytes(b"Weights")
    with pytest.raises(SystemExit) as ended:
        startup.start("verify", [f"--workdir={workdir}"])
    assert ended.value.code == 1
    assert capsys.readouterr().out.startswith("export/adapter.bin: has changed\n")
    with pytest.raises(SystemExit) as ended:
        startup.start("verify", [str(tmp_path)])
    assert ended.value.code == 2 and "ledger.jsonl: not there" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        startup.start("verify", [])
    assert ended.value.code == 2 and "--workdir: missing" in capsys.readouterr().err


def test_the_hash_of_pairs_is_of_all_that_is_learned():
    one = Encoded(np.arange(4, dtype=np.int32), np.array([0, 1, 1, 0], bool))
    other = one._replace(ids=one.ids[::-1])
    lists = [
        [one],
        [one, one],
        [one, other],
        [other, one],
        [one._replace(loss_mask=one.loss_mask * np.float32(0.5))],
        [one._replace(target=7)],
        [one._replace(target=8)],
        [one._replace(ids=one.ids[:2], loss_mask=one.loss_mask[:2])],
    ]
    assert len({ledger_lines.pairs_hash(pairs) for pairs in lists}) == len(lists)
    assert ledger_lines.pairs_hash([one]) == ledger_lines.pairs_hash([one._replace(notes=("cut",))])
