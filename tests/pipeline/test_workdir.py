"""Beginning a run in its workdir and going on with it, on one host or several."""

import pytest

from fedsafe_jax.config import default_config
from fedsafe_jax.pipeline import workdir
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
