"""Files of a run: cut, full disks, text that looks like markup."""

import errno
import os

import orbax.checkpoint as ocp
import pytest
from etils import epath
from safetensors import SafetensorError
from small_run import BORDER, small_config

from fedsafe_jax import experiment
from fedsafe_jax.models import hub
from fedsafe_jax.runtime import run_files
from fedsafe_jax.runtime.run_files import WorkdirError

FULL = os.strerror(errno.ENOSPC)
READ_ONLY = os.strerror(errno.EROFS)


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"seeds": [0',
        "[1]",
    ],
    ids=["empty", "cut", "list"],
)
def test_a_damaged_config_of_a_workdir(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(WorkdirError) as error:
        run_files.claim_workdir(epath.Path(tmp_path), {"rounds": 1})
    assert str(tmp_path / "config.json") in str(error.value)


def test_a_workdir_that_is_a_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(WorkdirError) as error:
        run_files.claim_workdir(epath.Path(path), {"rounds": 1})
    assert str(path) in str(error.value)


def test_a_disk_that_fills_while_the_model_is_exported(tmp_path, monkeypatch, capsys):
    def full(*args, **options):
        raise SafetensorError(f"Error while serializing: I/O error: {FULL} (os error 28)")

    config, workdir = small_config(), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(hub, "save_file", full)  # what writes the merged model
        with pytest.raises(BORDER) as error:
            experiment.run(config, str(workdir))
    assert str(workdir / "export") in str(error.value) and FULL in str(error.value)
    assert (workdir / "report.html").is_file() and (workdir / "results.json").is_file()
    assert "harmful refused" in capsys.readouterr().out
    experiment.run(config, str(workdir))
    assert (workdir / "export" / "merged" / "model.safetensors").is_file()


def test_a_disk_that_fills_before_the_first_checkpoint(tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, FULL)

    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    with pytest.raises(BORDER) as error:
        experiment.run(small_config(), str(tmp_path / "run"))
    assert str(tmp_path / "run") in str(error.value) and FULL in str(error.value)


def test_a_workdir_on_a_read_only_disk(tmp_path, monkeypatch):
    workdir = str(tmp_path / "run")

    def only_elsewhere(make):
        def checked(path, *args, **options):
            if os.fspath(path).startswith(workdir):
                raise OSError(errno.EROFS, READ_ONLY, os.fspath(path))
            return make(path, *args, **options)

        return checked

    for name in ("mkdir", "makedirs"):
        monkeypatch.setattr(os, name, only_elsewhere(getattr(os, name)))
    with pytest.raises(BORDER) as error:
        experiment.run(small_config(), workdir)
    assert workdir in str(error.value) and READ_ONLY in str(error.value)


def test_markup_in_the_data_is_text_in_the_report(tmp_path):
    config = small_config(
        "23-html-in-data",
        safe_sources=("chat:safe.jsonl",),
        eval__tasks=(
            "advbench=chat:prompts.jsonl",
            "over_refusal=chat:package/benign_heldout.jsonl",
            "utility",
        ),
    )
    workdir = tmp_path / "with space é"
    experiment.run(config, str(workdir))
    report = (workdir / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;document.title=" in report
    assert "<script" not in report and "<img src=x" not in report


def test_records_keep_rows_with_line_separators(tmp_path):
    path = epath.Path(tmp_path) / "round_000.jsonl"
    first = [{"arm": "a", "prompt": "one\u2028two"}, {"arm": "a", "prompt": "plain"}]
    second = [{"arm": "b", "prompt": "x"}]
    run_files.replace_lines(path, lambda row: row["arm"] == "a", first)
    run_files.replace_lines(path, lambda row: row["arm"] == "b", second)
    assert run_files.read_lines(path) == first + second
