"""Three sites with pairs of the packaged demo, and the surroundings of Flower's processes.

Imports wait until a fixture runs: without Flower the tests skip themselves before.
"""

import pytest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Writes the pairs of three sites, each of another size."""
    from test_flower import DEMO

    files = tmp_path_factory.mktemp("sites")
    safe = (DEMO / "clients_safe.jsonl").read_text().splitlines()
    unsafe = (DEMO / "clients_unsafe.jsonl").read_text().splitlines()
    for i in range(3):
        lines = [*safe[i::40][: 9 + i], *unsafe[i::60][:5]]
        (files / f"site{i}.jsonl").write_text("\n".join(lines) + "\n")
    return files


@pytest.fixture(autouse=True, scope="module")
def flower_process():
    """Gives this process what Flower gives its processes: the app's folder, and their ids."""
    from flwr.supercore.task_identity import TaskIdentity
    from test_flower import ROOT

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "launch/flower")
        for name in ("_run_id", "_node_id", "_task_id"):
            patch.setattr(TaskIdentity, name, 1)
        yield
