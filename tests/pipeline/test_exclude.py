"""Exact unlearning: `federated.exclude` is the run in which these clients always drop out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from tiny import tiny_config

from fedsafe_jax.config import ConfigError, default_config
from fedsafe_jax.data.chat import Encoded
from fedsafe_jax.federated import participation, simulation
from fedsafe_jax.federated.mesh import make_mesh
from fedsafe_jax.models import lora
from fedsafe_jax.models.decoder import Decoder
from fedsafe_jax.pipeline import round_setup, rounds
from fedsafe_jax.pipeline.arms import ARMS
from fedsafe_jax.pipeline.clients import Clients
from fedsafe_jax.pipeline.federation import learned_from
from fedsafe_jax.runtime import run_files
from fedsafe_jax.validation import validate

GONE = 1


def config_of(*exclude, **changes):
    """Three rounds of three of four clients."""
    c = default_config()
    c.arms, c.export_arm = ("fl",), "fl"
    c.rounds, c.local_steps, c.batch_size, c.seq_len = 3, 1, 2, 64
    c.num_clients, c.clients_per_round, c.examples_per_client = 4, 3, 8
    c.eval.tasks, c.eval.max_heldout = ("utility",), 4
    c.federated.exclude = exclude
    c.update_from_flattened_dict(changes)
    return c


def tiny_run(config, algorithm, programs, state, base):
    """The state after all rounds with made-up pairs, and the rows of metrics."""
    rng, found = np.random.default_rng(0), []
    data = [
        [Encoded(rng.integers(1, 97, 12).astype(np.int32), np.ones(12, bool)) for _ in range(5 + i)]
        for i in range(config.num_clients)
    ]
    for t in range(config.rounds):
        state, row = rounds.run(
            config, algorithm, programs, state=state, base=base, data=data, seed=0, t=t
        )
        found.append(row)
    return jax.device_get(state), found


def test_a_replay_is_the_run_in_which_the_client_always_dropped_out(monkeypatch):
    """To the bit, under SCAFFOLD, whose clients keep a state, with dropouts of others as well."""
    settings = {"algorithms": ("scaffold",), "federated.dropout": 0.2, "seq_len": 32}
    c = config_of(**settings)
    model, mesh = Decoder(tiny_config(), 2.0), make_mesh(jax.devices()[:1])
    blank = jnp.zeros((1, 4), jnp.int32)
    base = model.init(jax.random.key(0), blank, blank, blank)["params"]
    factors = lora.init(jax.random.key(1), tiny_config(), lora.LoraConfig(4, 8.0, ("q_proj",)))
    programs = round_setup.build(c, "scaffold", model, mesh)
    begin = "scaffold", programs, simulation.initial_state(programs, factors, 4), base
    plain, whole = tiny_run(c, *begin)
    replay, without = tiny_run(config_of(GONE, **settings), *begin)
    drawn = participation.draw_cohort

    def dropped_out(*args, **kwargs):
        cohort = drawn(*args, **kwargs)
        left = cohort.ids != GONE
        fields = {name: getattr(cohort, name)[left] for name in ("ids", "weights", "steps")}
        return cohort._replace(**fields, dropped_out=(*cohort.dropped_out, GONE))

    monkeypatch.setattr(participation, "draw_cohort", dropped_out)
    wanted, rows = tiny_run(c, *begin)
    jax.tree.map(np.testing.assert_array_equal, replay, wanted)  # with states of clients
    differ = [(a != b).any() for a, b in zip(*map(jax.tree.leaves, (plain, replay)), strict=True)]
    assert any(differ)
    for row, other, before in zip(without, rows, whole, strict=True):
        apart = ("unlearned", "dropped_out")
        assert [row[k] for k in row if k not in apart] == [
            other[k] for k in other if k not in apart
        ]
        drawn_before = GONE in before["clients"] + before["dropped_out"]
        assert row["unlearned"] == [GONE] * drawn_before and "unlearned" not in before
    assert any(row["unlearned"] for row in without)


def test_a_workdir_never_holds_rounds_with_and_without_a_client(tmp_path):
    workdir = epath.Path(tmp_path)
    run_files.claim_workdir(workdir, config_of().to_dict())
    with pytest.raises(run_files.WorkdirError, match=r"federated\.exclude=\[\], this command has"):
        run_files.claim_workdir(workdir, config_of(GONE).to_dict())


@pytest.mark.parametrize("sampling", ["uniform", "weighted", "poisson", "openfedllm"])
def test_all_others_draw_what_they_drew(sampling):
    c = config_of(num_clients=8, clients_per_round=5)
    c.federated.sampling, c.federated.dropout, c.federated.stragglers = sampling, 0.3, 0.5
    c.local_steps, sizes = 10, [3, 9, 5, 0, 7, 4, 6, 8]
    without = c.copy_and_resolve_references()
    without.federated.exclude = (1, 3, 6)
    for t in range(40):
        one, other = (
            rounds.draw_cohort(x, "fedavg", sizes, seed=0, t=t)._asdict() for x in (c, without)
        )
        drawn = [i for k in ("ids", "dropped_out", "no_data") for i in np.asarray(one[k]).tolist()]
        assert set(other["unlearned"]) == set(drawn) & {1, 3, 6} and not one["unlearned"]
        left = ~np.isin(one["ids"], (1, 3, 6))
        for name in ("ids", "weights", "steps"):
            np.testing.assert_array_equal(other[name], one[name][left])
        for name in ("dropped_out", "no_data"):
            assert other[name] == tuple(i for i in one[name] if i not in (1, 3, 6))


def test_baselines_leave_the_pairs_out_too():
    c = config_of(2, algorithms=("fedavg",))
    assert round_setup.arm_config(c, ARMS["local"]).federated.exclude == (2,)
    centralised = ARMS["centralised"]
    assert round_setup.arm_config(c, centralised).federated.exclude == ()
    assert learned_from(c, centralised, {"clients": [0], "no_data": []}) == [0, 1, 3]
    assert learned_from(c, ARMS["fl"], {"clients": [0], "no_data": [3]}) == [0, 3]
    assert learned_from(c, ARMS["cai"], {}) == []
    assert Clients(None).flagged is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"federated.exclude": (4,)}, "expected distinct clients, each less than num_clients=4"),
        ({"federated.exclude": (1, 1)}, "expected distinct clients"),
        ({"federated.exclude": (-1,)}, "-1 in it; expected whole numbers, each at least 0"),
        ({"federated.exclude": (1.0,)}, "1.0 in it; expected whole numbers"),
        ({"federated.exclude": (0, 1, 2, 3)}, "leaves 0 of num_clients=4, and every round needs 1"),
        (
            {"federated.exclude": (0, 1), "federated.aggregator": "median"},
            "leaves 2 of num_clients=4, and every round needs 3 of them",
        ),
        (
            {"federated.exclude": (0,), "federated.noise_multiplier": 1.0,
             "federated.clip_norm": 1.0},
            "does not go with noise_multiplier: the difference of two adapters",
        ),
        ({"federated.exclude": (0,), "algorithms": ("fedsa_lora",)}, "eval.client=0 and fedsa"),
        ({"federated.exclude": (0,), "arms": ("local", "fl")}, "eval.client=0 and local"),
    ],
)  # fmt: skip
def test_what_is_no_replay_is_refused(changes, message):
    with pytest.raises(ConfigError) as caught:
        validate(config_of(**changes))
    assert message in str(caught.value) and "federated.exclude" in str(caught.value)
