"""Whole runs with differential privacy: noise by arm, resumes, and what is said of epsilon."""

import itertools
import json
import signal

import jax
import numpy as np
import pytest
from etils import epath

from fedsafe_jax import experiment
from fedsafe_jax.config import default_config
from fedsafe_jax.pipeline import export, rounds
from fedsafe_jax.pipeline import inputs as inputs_lib
from fedsafe_jax.pipeline.arms import planned_arms
from fedsafe_jax.random_streams import Purpose, key
from fedsafe_jax.runtime import arm_secret, preemption


def private_config(**changes):
    c = default_config()
    c.arms, c.algorithms, c.export_arm = ("fl",), ("fedavg", "fedprox"), "fl"
    c.rounds, c.local_steps, c.batch_size = 2, 1, 2
    c.num_clients, c.clients_per_round, c.examples_per_client = 6, 3, 2
    c.eval.max_prompts = c.eval.max_heldout = 4
    c.eval.max_new_tokens = 8
    f = c.federated
    f.clip_norm, f.noise_multiplier, f.sampling = 0.05, 1.0, "poisson"
    for name, value in changes.items():
        setattr(c, name, value)
    return c


def test_noise_is_of_the_arm_and_survives_a_resume(tmp_path, monkeypatch, capsys):
    pytest.importorskip("dp_accounting")
    c, used = private_config(), []
    run_round = rounds.simulation.run_round

    def noted(*args, **options):
        used.append(jax.random.key_data(options["key"]).tolist())
        return run_round(*args, **options)

    monkeypatch.setattr(rounds.simulation, "run_round", noted)
    inputs = inputs_lib.load_inputs(c)
    secrets = itertools.count(1)

    def fixed():
        return next(secrets)

    results = experiment.run(c, str(tmp_path / "whole"), inputs, draw_secret=fixed)
    # Two algorithms of two rounds: four keys, none of which the seed gives.
    wanted = [key(Purpose.NOISE, s, t) for s in (1, 2) for t in (0, 1)]
    assert used == [jax.random.key_data(k).tolist() for k in wanted]

    # What anybody can read says nothing of the secret, and says what epsilon is of.
    private = results["privacy"]
    assert private["runs"] == 2 and 0 < private["epsilon"] < private["epsilon_of_all"]
    told = private["statement"]
    assert "must not be published" in told and f"{private['epsilon_of_all']:.2f}" in told
    assert "must not be published" in " ".join(capsys.readouterr().out.split())
    for name in ("report.html", "export/adapter/README.md"):
        assert "must not be published" in (tmp_path / "whole" / name).read_text(), name

    # Stopped before the second arm has a checkpoint, and again behind its first one.
    secrets, stopped, stops = itertools.count(1), tmp_path / "stopped", [6, 7]

    def until_stopped(*args, **options):
        if stops and len(used) == stops[0]:
            stops.pop(0)
            raise preemption.Preempted(signal.SIGTERM)
        return noted(*args, **options)

    monkeypatch.setattr(rounds.simulation, "run_round", until_stopped)
    for _ in range(2):
        with pytest.raises(preemption.Preempted):
            experiment.run(c, str(stopped), inputs, draw_secret=fixed)
    experiment.run(c, str(stopped), inputs)  # draws none: both secrets are there
    assert used[4:] == used[:4]
    tensors = [
        (w / "export/adapter/adapter_model.safetensors").read_bytes()
        for w in (tmp_path / "whole", stopped)
    ]
    assert tensors[0] == tensors[1]
    read = [json.loads(line) for line in (stopped / "metrics.jsonl").read_text().splitlines()]
    again = [json.loads(x) for x in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    for one, other in zip(read, again, strict=True):
        assert one["clients"] == other["clients"] and one["delta_norms"] == other["delta_norms"]


def test_what_a_client_sent_has_no_epsilon(tmp_path):
    """Its card is not that of the server's adapter: the update is kept before any noise."""
    pytest.importorskip("dp_accounting")
    c, folder = private_config(), epath.Path(tmp_path)
    (folder / "results.json").write_text('{"seeds": [0], "data": {"harmful_share_held": [0.25]}}')
    planned = planned_arms(c)[0]
    server = export.card_of_seed(
        c, folder, planned, seed=0, adapter_sha256="", note="The server's."
    )
    client = export.card_of_seed(
        c, folder, planned, seed=0, adapter_sha256="", note="A client's.", of_client=True
    )
    assert "epsilon" in server and "epsilon" not in client
    assert "Not differentially private" in client
    assert "25.0%" not in server + client  # an exact figure of the clients' data
    c.federated.noise_multiplier = 0.0
    plain = export.card_of_seed(
        c, folder, planned, seed=0, adapter_sha256="", note="A client's.", of_client=True
    )
    assert "private" not in plain and "25.0%" in plain


def test_cohorts_are_secret_where_epsilon_counts_on_it():
    """Amplification by sampling holds while nobody knows the cohort: a seed would tell it."""
    c, sizes = private_config(num_clients=40, clients_per_round=10), [1] * 40
    drawn = {
        tuple(rounds.draw_cohort(c, "fedavg", sizes, seed=0, t=0, secret=s).ids.tolist())
        for s in (arm_secret.draw() for _ in range(20))
    }
    assert len(drawn) == 20
    c.federated.noise_multiplier = 0.0
    one, other = (rounds.draw_cohort(c, "fedavg", sizes, seed=0, t=0) for _ in range(2))
    np.testing.assert_array_equal(one.ids, other.ids)


def test_without_noise_nothing_is_secret(tmp_path):
    c = private_config()
    c.federated.noise_multiplier = 0.0
    run = experiment.ArmRun(
        config=c, inputs=None, clients=None, own=None, federation=None, workdir=tmp_path,
        progress=None, owner=None, seed=0, planned=planned_arms(c)[0],
    )  # fmt: skip
    assert run.secret is None and not list(tmp_path.iterdir())
    assert rounds.privacy_of(c) == {}
