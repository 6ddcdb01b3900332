"""Folders to which nobody else may write: a run's, and that of compiled programs."""

import os
import types

import pytest
from etils import epath

from fedsafe_jax import own_folder
from fedsafe_jax.own_folder import claim_workdir
from fedsafe_jax.runtime import libraries
from fedsafe_jax.runtime.owner import owned
from fedsafe_jax.whole_files import WorkdirError


def mode(path):
    return path.stat().st_mode & 0o7777


@pytest.fixture
def as_user(monkeypatch):
    """Who is running, by number: the tests may run as root, which owns what they write."""

    def become(uid):
        monkeypatch.setattr(os, "geteuid", lambda: uid)

    return become


def test_a_new_workdir_is_the_users_own(tmp_path, caplog):
    old = os.umask(0o002)  # the group may write
    try:
        claim_workdir(epath.Path(tmp_path) / "runs" / "a")
    finally:
        os.umask(old)
    assert mode(tmp_path / "runs" / "a") == 0o700
    assert not caplog.text


def test_an_existing_workdir_keeps_its_mode(tmp_path, caplog):
    (tmp_path / "a").mkdir(mode=0o755)
    claim_workdir(tmp_path / "a")
    assert mode(tmp_path / "a") == 0o755 and not caplog.text


def test_a_workdir_that_anybody_may_write_to_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a").chmod(0o1777)  # as a shared temporary directory, which is no workdir
    with pytest.raises(WorkdirError, match=f"anybody may write to {tmp_path}/a.*chmod go-w") as e:
        claim_workdir(tmp_path / "a")
    assert "\n" not in str(e.value)


def test_a_folder_above_must_be_sticky_where_anybody_may_write(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    claim_workdir(shared / "fine")
    shared.chmod(0o777)
    with pytest.raises(WorkdirError, match=f"anybody may write to {shared}, "):
        claim_workdir(shared / "wrong")


def test_a_workdir_of_another_user_is_refused_and_root_is_told(tmp_path, as_user, caplog):
    (tmp_path / "a").mkdir()
    status = (tmp_path / "a").stat()
    if status.st_uid == 0:
        os.chown(tmp_path / "a", 1234, -1)
    owner = (tmp_path / "a").stat().st_uid
    as_user(owner)
    claim_workdir(tmp_path / "a")
    as_user(owner + 1)
    with pytest.raises(WorkdirError, match=rf"belongs to another user \(uid {owner}\)"):
        claim_workdir(tmp_path / "a")
    as_user(0)
    claim_workdir(tmp_path / "a")
    assert caplog.text.count("belongs to another user") == 1


def test_a_group_that_may_write_is_a_warning(tmp_path, caplog):
    (tmp_path / "a").mkdir()
    (tmp_path / "a").chmod(0o770)
    claim_workdir(tmp_path / "a")
    assert "its group may write" in caplog.text


@pytest.mark.parametrize(
    "name", ["config.json", "metrics.jsonl", "cai", "checkpoints", "export", "arms/deep/x.json"]
)
@pytest.mark.parametrize("target", ["folder", "missing"])
def test_a_link_out_of_the_workdir_is_refused_before_anything_is_written(tmp_path, name, target):
    workdir, outside = tmp_path / "run", tmp_path / "folder"
    outside.mkdir()
    link = workdir / name
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / target)
    with pytest.raises(WorkdirError, match=f"{link} is a link to {tmp_path / target}, out of"):
        claim_workdir(workdir)
    assert not list(outside.iterdir()) and not (tmp_path / "missing").exists()


def test_links_within_and_a_workdir_that_is_one_are_fine(tmp_path):
    (tmp_path / "real" / "a").mkdir(parents=True)
    (tmp_path / "real" / "b").symlink_to("a")
    (tmp_path / "run").symlink_to(tmp_path / "real")
    claim_workdir(tmp_path / "run")
    with owned(epath.Path(tmp_path / "run")):
        assert (tmp_path / "real" / "owner.json").is_file()


def test_a_bucket_has_rules_of_its_own():
    claim_workdir("gs://bucket/run")


@pytest.fixture
def config(monkeypatch):
    """The settings of jax, with no compilation cache."""
    values = types.SimpleNamespace(jax_compilation_cache_dir=None)
    values.update = lambda name, value: setattr(values, name, value)
    monkeypatch.setattr(libraries, "jax", types.SimpleNamespace(config=values))
    monkeypatch.setattr(libraries, "quiet_libraries", lambda: None)
    return values


def test_compiled_programs_are_kept_for_the_user_alone(tmp_path, config, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    libraries.prepare_libraries(str(tmp_path / "run"))
    kept = tmp_path / "fedsafe_jax" / "programs"
    assert config.jax_compilation_cache_dir == str(kept) and mode(kept) == 0o700
    assert mode(kept.parent) == 0o700 and not caplog.text


@pytest.mark.parametrize("wrong", ["group", "all", "foreign"])
def test_compiled_programs_of_others_are_not_run(
    tmp_path, config, monkeypatch, caplog, as_user, wrong
):
    kept = tmp_path / "fedsafe_jax" / "programs"
    kept.mkdir(parents=True)
    kept.chmod({"group": 0o770, "all": 0o777, "foreign": 0o700}[wrong])
    if wrong == "foreign":
        os.chown(kept, os.geteuid() or 1234, -1)
        as_user(77)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    libraries.prepare_libraries(str(tmp_path / "run"))
    assert config.jax_compilation_cache_dir is None
    assert caplog.text.count("Compiled programs are not kept") == 1


def test_a_cache_given_by_hand_is_used_with_a_warning(tmp_path, config, caplog):
    config.jax_compilation_cache_dir = str(tmp_path)
    libraries.prepare_libraries(str(tmp_path / "run"))
    assert not caplog.text
    tmp_path.chmod(0o775)
    libraries.prepare_libraries(str(tmp_path / "run"))
    assert "its group may write" in caplog.text and "programs that are run" in caplog.text
    assert config.jax_compilation_cache_dir == str(tmp_path)


def test_without_a_home_nothing_is_kept(config, monkeypatch, caplog, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda name: name)
    monkeypatch.chdir(tmp_path)
    libraries.prepare_libraries("run")
    assert config.jax_compilation_cache_dir is None and "no home folder" in caplog.text
    assert not os.listdir(tmp_path)


def test_programs_of_a_bucket_are_kept_there(config):
    libraries.prepare_libraries("gs://bucket/run/")
    assert config.jax_compilation_cache_dir == "gs://bucket/run/compilation_cache"


def test_a_workdir_below_a_file_is_one_line(tmp_path):
    (tmp_path / "a").write_text("")
    for name in ("a", "a/b"):
        with pytest.raises(WorkdirError, match="is a file, or lies below one"):
            own_folder.claim_workdir(tmp_path / name)


def test_a_run_stops_before_it_reads_anything(tmp_path, monkeypatch):
    """Nothing is computed, and nothing written, beside what is refused."""
    from fedsafe_jax import experiment
    from fedsafe_jax.config import default_config

    def reads(config):
        raise AssertionError("the inputs were read")

    monkeypatch.setattr(experiment, "validate", lambda config: None)
    monkeypatch.setattr(experiment, "load_inputs", reads)
    (tmp_path / "elsewhere").mkdir()
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "cai").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WorkdirError, match="out of the folder of the run"):
        experiment.run(default_config(), str(workdir))
    (workdir / "cai").unlink()
    workdir.chmod(0o777)
    with pytest.raises(WorkdirError, match="anybody may write"):
        experiment.run(default_config(), str(workdir))
    assert not os.listdir(workdir) and not os.listdir(tmp_path / "elsewhere")
