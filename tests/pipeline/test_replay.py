"""A replay begins where an excluded client was first drawn, with the first run's files."""

import json

import jax
import numpy as np
import pytest
from etils import epath
from ledger_run import ROUNDS, clients_of, files_of, findings, lived, row_of

from fedsafe_jax.config import ConfigError
from fedsafe_jax.federated.algorithms import ServerState
from fedsafe_jax.federated.simulation import FederatedState
from fedsafe_jax.pipeline import dry_run, ledger_lines, replay
from fedsafe_jax.pipeline.arms import planned_arms
from fedsafe_jax.runtime import checkpoint, fingerprints, run_files
from fedsafe_jax.validation import validate
from fedsafe_jax.whole_files import WorkdirError


def state_of(done):
    """A state that says how many rounds it has seen, of the server and of what clients keep."""
    server = ServerState({"a": np.full((2, 3), done, np.float32)}, (), ())
    return FederatedState(server, {"states": {"c": np.full((4, 2), done, np.float32)}})


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A run whose rounds were those of clients 0, 1 and 0, with all of its checkpoints."""
    workdir = epath.Path(tmp_path_factory.mktemp("original"))
    lived(workdir)
    files, _ = files_of(workdir)
    saved = checkpoint.RoundCheckpoints(files.checkpoints, keep=0)
    for done in range(1, ROUNDS + 1):
        saved.save(done, state_of(done))
    saved.close()
    return workdir


def begun(workdir, original, *exclude, **changes):
    """Files, config and lines of a replay that has just begun."""
    fields = {"federated.exclude": exclude, "federated.replay": str(original)}
    files, c = files_of(workdir, **fields | changes)
    fingerprints.check(workdir, {"constitution": "be kind"})
    run_files.claim_workdir(workdir, c.to_dict())
    return c, files, ledger_lines.ArmLines(c, clients_of(), files)


@pytest.mark.parametrize(("exclude", "done"), [((1,), 1), ((0,), 0), ((3,), 3), ((3, 1), 1)])
def test_rounds_before_the_client_was_drawn_are_taken_over(original, tmp_path, exclude, done):
    workdir = epath.Path(tmp_path)
    c, files, lines = begun(workdir, original, *exclude)
    for _ in range(2):  # killed behind the first, before there was a checkpoint
        state, rounds = replay.take_over(c, files, lines, state_of(0))
        assert rounds == done
        jax.tree.map(np.testing.assert_array_equal, state, state_of(done))
    if not done:
        assert not (workdir / "metrics.jsonl").exists()
        return
    lines.go_on(done, f"adapter{done}")
    rows = run_files.read_lines(workdir / "metrics.jsonl")
    old = run_files.read_lines(original / "metrics.jsonl")[:done]
    assert [r["unlearned"] for r in rows] == [[]] * done
    kept = [{k: v for k, v in row.items() if k not in ("unlearned", "ledger")} for row in rows]
    assert kept == [{k: v for k, v in row.items() if k != "ledger"} for row in old]
    for t in range(done):
        name = run_files.cai_name(t)
        assert (workdir / "cai" / name).read_bytes() == (original / "cai" / name).read_bytes()
    row = lines.add_round(row_of(files, done) | {"clients": []}, [], [], f"adapter{done + 1}")
    files.record(row, [])
    assert findings(workdir) == []
    assert findings(original) == []  # which was only read


def test_a_centralised_learner_had_the_pairs_from_the_first_round_on(original, tmp_path):
    c, files, lines = begun(epath.Path(tmp_path), original, 3)
    c.arms = ("centralised",)
    (planned,) = planned_arms(c)
    files = files._replace(planned=planned)
    assert replay.take_over(c, files, lines, state_of(0))[1] == 0


def test_another_run_is_no_start_of_a_replay(original, tmp_path):
    for number, (changes, message) in enumerate(
        (
            ({"learning_rate": 0.5}, "with learning_rate=0.004, this command has 0.5"),
            ({"federated.replay": str(tmp_path)}, "no config.json; give the folder of a run"),
            ({"checkpoint_keep": 0, "keep_updates": True}, ""),
        )
    ):
        workdir = epath.Path(tmp_path) / str(number)
        workdir.mkdir()
        c, files, lines = begun(workdir, original, 1, **changes)
        if not message:
            assert replay.take_over(c, files, lines, state_of(0))[1] == 1
            continue
        with pytest.raises(WorkdirError, match=message):
            replay.check(c)
    inputs = json.loads((workdir / "inputs.json").read_text())
    inputs["constitution"]["sha256"] = "0" * 64
    (workdir / "inputs.json").write_text(json.dumps(inputs))
    with pytest.raises(WorkdirError, match="began with another constitution"):
        replay.take_over(c, files, lines, state_of(0))


def test_a_client_that_was_unlearned_stays_unlearned(original, tmp_path):
    c, files, lines = begun(epath.Path(tmp_path), original, 3)
    again = files_of(tmp_path, **{"federated.exclude": (1,), "federated.replay": str(tmp_path)})[1]
    with pytest.raises(WorkdirError, match="is a run without client 3, which has a part"):
        replay.check(again)
    again.federated.exclude = (3, 1)
    assert replay.check(again) == {1}


def test_a_replay_without_an_excluded_client_is_refused():
    _, c = files_of("x", **{"federated.replay": "runs/first"})
    with pytest.raises(ConfigError, match="federated.replay='runs/first' without exclude"):
        validate(c)


def test_a_dry_run_checks_the_first_run_and_says_which_it_is(original):
    _, c = files_of(original, **{"federated.exclude": (1,)})
    c.dry_run, c.date = True, ""
    assert dry_run._unlearning(c) == "without client(s) 1; all rounds are repeated"
    c.federated.replay = str(original)
    assert dry_run._unlearning(c).endswith(f"are taken from {original}")
    c.rounds += 1
    with pytest.raises(WorkdirError, match=f"is a run with rounds={ROUNDS}, this command has"):
        dry_run._unlearning(c)
