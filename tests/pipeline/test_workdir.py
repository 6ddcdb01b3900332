"""Beginning a run in its workdir and going on with it, on one host or several."""

import pytest

from fedsafe_jax.config import default_config
from fedsafe_jax.pipeline import workdir
from fedsafe_jax.pipeline.arms import planned_arms
from fedsafe_jax.runtime import multihost, run_files


@pytest.mark.parametrize("begun", [False, True])
def test_all_hosts_wait_for_each_other_equally_often(tmp_path, monkeypatch, begun):
    # A host that waits once more than the others, or once less, hangs or takes another's value.
    waited: dict[bool, list[str]] = {True: [], False: []}
    monkeypatch.setattr(run_files, "check_config", lambda *args: begun)
    monkeypatch.setattr(workdir.fingerprints, "check", lambda *args: "same")
    told = {}
    for primary in (True, False):
        names = waited[primary]

        def broadcast(value, names=names):
            names.append("array")
            return value

        def broadcast_bool(value, names=names, primary=primary):
            names.append("bool")
            return told.setdefault("value", value) if primary else told["value"]

        monkeypatch.setattr(multihost, "is_primary", lambda primary=primary: primary)
        monkeypatch.setattr(multihost, "broadcast", broadcast)
        monkeypatch.setattr(multihost, "broadcast_bool", broadcast_bool)
        assert workdir.was_begun(default_config(), tmp_path, None) is begun
    assert waited[True] == waited[False]


@pytest.mark.parametrize("line", [b"5", b"null", b"{}", b'{"arm": "fl"}', b"\xe4", b"[" * 100_000])
def test_a_damaged_line_of_the_metrics_is_one_line(tmp_path, line):
    planned = next(one for one in planned_arms(default_config()) if one.arm.trains)
    files = workdir.ArmFiles(tmp_path, planned, 0)
    row = {"arm": planned.id, "seed": 0, "round": 0}
    files.record(row, [])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line + b"\n" + path.read_bytes())
    before = path.read_bytes()
    with pytest.raises(run_files.WorkdirError, match=r"metrics\.jsonl") as error:
        files.record(row | {"round": 1}, [])
    assert "\n" not in str(error.value) and path.read_bytes() == before
