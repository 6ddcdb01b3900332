"""Files of a run: cut, full disks, text that looks like markup."""

import errno
import hashlib
import json
import os
import shutil
import signal

import orbax.checkpoint as ocp
import pytest
from etils import epath
from safetensors import SafetensorError
from small_run import BORDER, small_config

from fedsafe_jax import experiment, load_adapter
from fedsafe_jax.cli import startup
from fedsafe_jax.data.examples import SourceError
from fedsafe_jax.models import base_model, hub
from fedsafe_jax.models.adapter_hash import adapter_hash
from fedsafe_jax.runtime import preemption, run_files
from fedsafe_jax.runtime.owner import owned
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


def test_a_workdir_that_another_run_writes_to(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "load_inputs", lambda config: pytest.fail("it loads a model"))
    with owned(epath.Path(tmp_path)):
        with pytest.raises(BORDER) as error:
            experiment.run(small_config(), str(tmp_path))
        assert f"{tmp_path} is in use by process {os.getpid()}" in str(error.value)
        assert os.listdir(tmp_path) == ["owner.json"]


def test_a_run_that_ends_otherwise_gives_its_workdir_back(tmp_path, monkeypatch):
    for end in (preemption.Preempted(signal.SIGTERM), KeyboardInterrupt(), SourceError("wrong")):

        def load(config, end=end):
            raise end

        monkeypatch.setattr(experiment, "load_inputs", load)
        with pytest.raises(type(end)):
            experiment.run(small_config(), str(tmp_path))
        # Nothing is claimed: the config may be put right in the same workdir.
        assert not os.listdir(tmp_path)


def test_files_that_change_between_two_starts(tmp_path, monkeypatch, capsys):
    data, model, workdir = (tmp_path / name for name in ("data", "model", "run"))
    data.mkdir()
    row = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
    rows = [json.dumps(row | {"label": "safe"}).replace("?", f"Ask {i} apples") for i in range(40)]
    (data / "safe.jsonl").write_text("\n".join(rows))
    shutil.copytree(base_model.PACKAGED_FOLDER, model)
    config = small_config(
        arms=("base",),
        model=str(model),
        data_dir=str(data),
        safe_sources=("chat:safe.jsonl",),
        eval__tasks=("utility",),
    )
    first = experiment.run(config, str(workdir))
    assert {"data/safe.jsonl", "data/package/clients_unsafe.jsonl", "model/config.json"} < set(
        json.loads((workdir / "inputs.json").read_text())
    )
    assert experiment.run(config, str(workdir))["arms"] == first["arms"]
    monkeypatch.setattr(experiment, "load_inputs", lambda config: pytest.fail("it loads a model"))
    for path in (data / "safe.jsonl", model / "tokenizer.json"):
        old = path.read_bytes()
        path.write_bytes(old + b"\n")
        with pytest.raises(BORDER) as error:
            experiment.run(config, str(workdir))
        for content in (old, old + b"\n"):
            assert hashlib.sha256(content).hexdigest()[:12] in str(error.value)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
        path.write_bytes(old)
    monkeypatch.undo()
    (workdir / "inputs.json").unlink()  # as an older version leaves it
    capsys.readouterr()
    experiment.run(config, str(workdir))
    assert "inputs.json was not there" in capsys.readouterr().err
    assert (workdir / "inputs.json").is_file()


def test_damaged_outcomes_of_an_arm_are_made_again(tmp_path, caplog):
    config = small_config()
    first = experiment.run(config, str(tmp_path))
    path = tmp_path / "arms" / "fl_seed0.json"
    whole = json.loads(path.read_text())
    no_figures = json.dumps(whole | {"utility": {}})
    no_adapter = json.dumps({k: v for k, v in whole.items() if k != "adapter_sha256"})
    for content in ("", "[1]", "{}", no_figures, no_adapter):
        path.write_text(content)
        again = experiment.run(config, str(tmp_path))
        assert again["arms"] == first["arms"]
        assert json.loads(path.read_text()) | {"seconds": 0} == whole | {"seconds": 0}
    assert [p.name for p in sorted((tmp_path / "arms").glob("*.damaged*"))] == [
        "fl_seed0.json.damaged",
        *(f"fl_seed0.json.damaged{i}" for i in range(2, 6)),
    ]


def written_by(workdir) -> dict[str, bytes]:
    """The scores and the export of a run, by file."""
    files = [workdir / "results.json", *(workdir / "export").rglob("*")]
    return {str(p.relative_to(workdir)): p.read_bytes() for p in files if p.is_file()}


@pytest.mark.parametrize("damage", ["all gone", "newest damaged", "another adapter"])
def test_scores_stand_beside_the_adapter_that_was_evaluated(tmp_path, damage):
    """Else an untrained adapter would be exported under the scores of a trained one."""
    config = small_config(rounds=2)
    first = experiment.run(config, str(tmp_path))
    outcome = tmp_path / "arms" / "fl_seed0.json"
    hash_ = json.loads(outcome.read_text())["adapter_sha256"]
    adapter = load_adapter(tmp_path / "export" / "adapter")
    assert hash_ == adapter_hash(adapter.factors) == first["arms"]["fl"]["adapter_sha256"][0]
    for name in ("adapter", "merged"):
        assert hash_ in (tmp_path / "export" / name / "README.md").read_text()
    before, checkpoints = written_by(tmp_path), tmp_path / "checkpoints" / "fl" / "seed0"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["1", "2"]
    if damage == "all gone":
        shutil.rmtree(checkpoints)
    elif damage == "newest damaged":
        for path in (checkpoints / "2" / "default").rglob("*"):
            if path.is_file():
                path.write_bytes(b"")
    else:
        shutil.rmtree(checkpoints / "2")
        shutil.copytree(checkpoints / "1", checkpoints / "2")
    with pytest.raises(run_files.WorkdirError) as error:
        experiment.run(config, str(tmp_path))
    said = {"all gone": "is not there", "newest damaged": "is of round 1"}
    assert said.get(damage, "holds another adapter") in str(error.value)
    assert "fl_seed0.json" in str(error.value) and "\n" not in str(error.value)
    assert written_by(tmp_path) == before
    if damage == "another adapter":
        with pytest.raises(SystemExit):
            place = (f"--workdir={tmp_path}", f"--output={tmp_path / 'new'}")
            startup.start("export", ["--arm=fl", "--seed=0", *place])
        assert not (tmp_path / "new" / "adapter_model.safetensors").exists()
        return
    # Told to, the same command repeats what is missing, and ends in the same scores and adapter.
    outcome.unlink()
    assert experiment.run(config, str(tmp_path))["arms"] == first["arms"]
    adapter = "export/adapter/adapter_model.safetensors"
    assert written_by(tmp_path)[adapter] == before[adapter]


def test_arms_that_are_not_exported_need_no_checkpoint_any_more(tmp_path):
    config = small_config(export_arm="fl+cai")
    first = experiment.run(config, str(tmp_path))
    shutil.rmtree(tmp_path / "checkpoints")
    assert experiment.run(config, str(tmp_path))["arms"] == first["arms"]


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
