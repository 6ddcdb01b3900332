"""Files that a run reads are known by their content."""

import hashlib
import json
import os

import pytest
from etils import epath

from fedsafe_jax.runtime import fingerprints
from fedsafe_jax.runtime.run_files import WorkdirError


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def workdir(tmp_path):
    return epath.Path(tmp_path) / "run"


def test_a_changed_file_is_named_with_both_hashes(workdir, tmp_path):
    data, model = tmp_path / "data.jsonl", tmp_path / "model.safetensors"
    data.write_bytes(b"one"), model.write_bytes(b"weights")
    files = {"data/data.jsonl": data, "model/model.safetensors": model, "rows": "text \ud800"}
    assert fingerprints.check(workdir, files) == "written"
    stored = json.loads((workdir / "inputs.json").read_text())
    assert stored["data/data.jsonl"]["sha256"] == sha256(b"one")
    assert fingerprints.check(workdir, files) == "same"
    data.write_bytes(b"two")
    os.utime(data, ns=tuple(stored["data/data.jsonl"]["times"]))  # as a copy that keeps times
    with pytest.raises(WorkdirError) as error:
        fingerprints.check(workdir, files)
    line = str(error.value)
    assert str(data) in line and sha256(b"one")[:12] in line and sha256(b"two")[:12] in line
    assert "1 file(s) differ" in line and "\n" not in line
    data.write_bytes(b"one")  # the same content again, at another time
    assert fingerprints.check(workdir, files) == "same"


def test_a_file_that_is_gone_or_new_is_named(workdir, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_bytes(b"one")
    fingerprints.check(workdir, {"data/data.jsonl": data})
    with pytest.raises(WorkdirError, match=f"{data}.* is gone"):
        fingerprints.check(workdir, {})
    with pytest.raises(WorkdirError, match="new.jsonl.* was not there"):
        fingerprints.check(workdir, {"data/data.jsonl": data, "data/new.jsonl": data})


def test_the_same_files_elsewhere_are_the_same(workdir, tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_bytes(b"content")
    fingerprints.check(workdir, {"model/a": tmp_path / "here" / "a"})
    assert fingerprints.check(workdir, {"model/a": tmp_path / "there" / "a"}) == "same"


def test_large_files_are_read_once_and_the_hubs_not_at_all(workdir, tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprints, "ALWAYS_READ_BYTES", 3)
    big, reads = tmp_path / "big", []
    big.write_bytes(b"weights")
    blob = tmp_path / "blobs" / sha256(b"named by its content")
    blob.parent.mkdir()
    blob.write_bytes(b"named by its content")
    link = tmp_path / "model.safetensors"
    link.symlink_to(blob)
    hashed = fingerprints.of_file
    monkeypatch.setattr(fingerprints, "of_file", lambda path: (reads.append(path), hashed(path))[1])
    files = {"big": big, "link": link}
    for _ in range(2):
        fingerprints.check(workdir, files)
        assert reads == [big]
    stored = json.loads((workdir / "inputs.json").read_text())
    assert stored["link"]["sha256"] == sha256(blob.read_bytes())
    big.write_bytes(b"WEIGHTS")
    os.utime(big, ns=tuple(stored["big"]["times"]))
    with pytest.raises(WorkdirError, match="big"):
        fingerprints.check(workdir, files)


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}'])
def test_a_damaged_list_is_written_anew_and_kept(workdir, tmp_path, content):
    data = tmp_path / "data.jsonl"
    data.write_bytes(b"one")
    workdir.mkdir()
    (workdir / "inputs.json").write_text(content)
    assert fingerprints.check(workdir, {"data/data.jsonl": data}) == "written"
    assert (workdir / "inputs.json.damaged").read_text() == content
    assert fingerprints.check(workdir, {"data/data.jsonl": data}) == "same"
