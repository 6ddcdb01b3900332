"""From a config to rounds: schedules, presets, what does not go together."""

import importlib.util
import pathlib

import numpy as np
import pytest

from fedsafe_jax.config import ConfigError, default_config
from fedsafe_jax.data.chat import Encoded
from fedsafe_jax.federated.client import OptimizerError, make_optimizer
from fedsafe_jax.federated.schedules import round_rate, step_rates
from fedsafe_jax.pipeline import round_setup, rounds
from fedsafe_jax.pipeline.arms import ARMS, planned_arms, references
from fedsafe_jax.pipeline.clients import learned, roles
from fedsafe_jax.validation import validate

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def config_of(name):
    """The config of a file in `configs/`."""
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def test_openfedllms_cosine():
    c = config_of("openfedllm")
    found = [round_rate(rounds.learning_rates(c), t) for t in (0, 1, 100, 199)]
    np.testing.assert_allclose(found, [5e-5, 4.99969775e-5, 2.55e-5, 1.00302e-6], rtol=1e-5)


def test_schedules_over_rounds_and_steps():
    c = default_config()
    c.learning_rate, c.min_learning_rate, c.rounds, c.local_steps = 1.0, 0.0, 10, 4
    c.schedule, c.warmup_rounds = "linear", 2
    found = [round_rate(rounds.learning_rates(c), t) for t in range(10)]
    np.testing.assert_allclose(found[:3], [1 / 3, 2 / 3, 1.0])
    np.testing.assert_allclose(found[2:], 1 - np.arange(8) / 8)
    c.schedule = "constant"
    assert round_rate(rounds.learning_rates(c), 9) == 1.0
    np.testing.assert_array_equal(step_rates(rounds.learning_rates(c), 5), np.ones(4, np.float32))
    c.step_schedule = "linear"
    np.testing.assert_allclose(step_rates(rounds.learning_rates(c), 5), [1, 0.75, 0.5, 0.25])
    c.step_schedule = "cosine"
    np.testing.assert_allclose(
        step_rates(rounds.learning_rates(c), 5),
        0.5 * (1 + np.cos(np.pi * np.arange(4) / 4)),
        rtol=1e-6,
    )


def client(weights):
    """A client's encoded pairs of the given weights."""
    mask = np.array([0, 0, 1, 1], np.float32)
    return [Encoded(np.arange(4, dtype=np.int32), mask * np.float32(w)) for w in weights]


def test_a_client_weighs_what_it_learned():
    c = default_config()
    c.num_clients = c.clients_per_round = 4
    whole = [e._replace(loss_mask=e.loss_mask > 0) for e in client([1, 1, 1])]
    data = [client([1, 1, 0]), client([0.05] * 3), client([0, 0]), whole]
    sizes = list(map(learned, data))
    np.testing.assert_allclose(sizes, [2, 0.15, 0, 3], rtol=1e-6)
    cohort = rounds.draw_cohort(c, "fedavg", sizes, seed=0, t=0)
    assert cohort.ids.tolist() == [0, 1, 3] and cohort.no_data == (2,)
    np.testing.assert_allclose(cohort.weights, [2, 0.15, 3], rtol=1e-6)
    # The plain mean, and differential privacy, count all that learn alike.
    assert rounds.draw_cohort(c, "fedadam", sizes, seed=0, t=0).weights.tolist() == [1, 1, 1]
    c.federated.weighting = "uniform"
    assert rounds.draw_cohort(c, "fedavg", sizes, seed=0, t=0).weights.tolist() == [1, 1, 1]
    # Drawn by weight, of which all together may be less than 1.
    c.federated.weighting, c.federated.sampling = "auto", "weighted"
    drawn = [rounds.draw_cohort(c, "fedavg", [0.0, 0.3, 0.1], seed=0, t=t) for t in range(50)]
    assert all(cohort.weights.sum() == 4 for cohort in drawn)
    times = sum(cohort.weights[cohort.ids == 1].sum() for cohort in drawn)
    assert 130 < times < 170  # 200 draws, of which three quarters are expected


def test_roles_cycle_through_ranks():
    c = default_config()
    c.num_clients, c.federated.client_ranks, c.attack.clients = 5, (4, 8), 0.4
    who = roles(c, 3)
    np.testing.assert_array_equal(who.ranks, [4, 8, 4, 8, 4])
    assert len(who.malicious) == 2 and who.malicious == roles(c, 3).malicious


@pytest.mark.parametrize("name", ["demo", "lab", "openfedllm", "paper"])
def test_every_config_is_valid(name):
    validate(config_of(name))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithms": ("scaffold",), "federated.aggregator": "median"}, "scaffold, whose"),
        ({"federated.average": "product", "federated.aggregator": "median"}, "average='product'"),
        ({"federated.client_ranks": (4, 16), "federated.aggregator": "krum"}, "client_ranks"),
        (
            {"federated.noise_multiplier": 1.0, "federated.clip_norm": 1.0,
             "federated.sampling": "weighted"},
            "needs sampling uniform or poisson",
        ),
        (
            {"federated.noise_multiplier": 1.0, "federated.clip_norm": 1.0,
             "federated.client_ranks": (4, 16)},
            "do not go together",
        ),
        (
            {"federated.noise_multiplier": 1.0, "federated.clip_norm": 1.0, "attack.clients": 0.2,
             "attack.kind": "scaled"},
            "a client moves the sum by more than clip_norm",
        ),
        (
            {"federated.average": "product", "federated.server_learning_rate": 0.5},
            "server_learning_rate=0.5: the basis of the factors changes every round; use fedavg, "
            "fedprox, constrained_sft or kl_start with server_learning_rate=1",
        ),
        *(
            ({"federated.average": "product", "algorithms": ("fedavg", name)}, f"algorithm {name}")
            for name in ("fedavgm", "fedadam", "fedyogi", "fedadagrad", "scaffold")
        ),
        (
            {"federated.average": "product", "federated.compression": "topk"},
            "compression='topk' with its error feedback",
        ),
        (
            {"federated.average": "product", "federated.stragglers": 0.5},
            "does not go with stragglers=0.5",
        ),
        *(
            ({"algorithms": (name,), field: value}, f"does not go with algorithm {name}: ")
            for name, field, value in (
                ("fedex_lora", "federated.aggregator", "median"),
                ("fedex_lora", "lora_dropout", 0.1),
                ("flora", "federated.compression", "topk"),
                ("flora", "federated.stragglers", 0.5),
                ("fedsvd", "federated.compression", "int8"),
                ("fedrot_lora", "federated.client_ranks", (4, 16)),
                ("feddyn", "federated.weighting", "examples"),
                ("local", "federated.compression", "int8"),
                ("hetlora", "federated.noise_multiplier", 1.0),
            )
        ),
        *(
            ({"federated.average": "product", "algorithms": (name,)}, f"algorithm {name}")
            for name in ("ffa_lora", "fedex_lora", "fedsvd", "fedrot_lora", "fednova")
        ),
        ({"algorithms": ("fedsa_lora",)}, "fl+cai, fl+filter+cai does not go with"),
        ({"eval.client": 20}, "eval.client=20: expected less than num_clients=20"),
        (
            {"arms": ("base", "local"), "export_arm": "local", "federated.noise_multiplier": 1.0,
             "federated.clip_norm": 1.0},
            "baselines are not private",
        ),
        ({"federated.constrained_betas": ()}, "constrained_betas=(): expected at least one beta"),
        ({"federated.constrained_betas": (-1.0,)}, "-1.0 in it; expected numbers, each at least 0"),
        ({"federated.reference": "start"}, "federated.reference: 'start' is not one of global"),
        ({"federated.dropout": 1.0}, "federated.dropout=1.0: expected a share between 0 and 0.99"),
        ({"warmup_rounds": 6}, "warmup_rounds=6: expected fewer than rounds=6"),
        ({"step_schedule": "cosin"}, "Did you mean 'cosine'?"),
        ({"optimizer": "adamm"}, "optimizer: 'adamm' is no optimizer"),
        ({"accumulation": 0}, "accumulation=0: expected at least 1"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_named(changes, message):
    c = default_config()
    c.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError) as caught:
        validate(c)
    assert message in str(caught.value)


@pytest.mark.parametrize("spec", ["adam", "adamw(weight_decay=0.01)", "sgd(momentum=0.9)", "lion"])
def test_any_optax_optimizer_by_name(spec):
    assert callable(make_optimizer(spec).update)


@pytest.mark.parametrize("spec", ["adam(", "adam(0.1)", "adam(learning_rate=1.0)", "chain", "a.b"])
def test_other_optimizers_are_refused(spec):
    with pytest.raises(OptimizerError):
        make_optimizer(spec)


def test_privacy_without_its_accountant_is_named_at_once(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    c = default_config()
    c.federated.clip_norm = c.federated.noise_multiplier = 1.0
    with pytest.raises(ConfigError, match="needs dp-accounting"):
        validate(c)


def test_the_delta_of_privacy_is_a_probability():
    pytest.importorskip("dp_accounting")
    c = default_config()
    c.federated.clip_norm = c.federated.noise_multiplier = 1.0
    c.federated.delta = 0.0
    with pytest.raises(ConfigError, match="federated.delta=0.0: expected more than 0, less than 1"):
        validate(c)


def test_baselines_learn_from_as_many_batches_and_nothing_else_of_a_federation():
    c = default_config()
    c.arms, c.algorithms = ("base", "fl", "local", "centralised"), ("fedex_lora", "fedadam")
    c.federated.compression, c.federated.dropout, c.attack.clients = "int8", 0.1, 0.2
    c.federated.client_ranks = (4, 16)
    assert round_setup.arm_config(c, ARMS["fl"]) is c
    local = round_setup.arm_config(c, ARMS["local"])
    assert (local.federated.dropout, local.federated.client_ranks) == (0.1, (4, 16))
    assert (local.federated.compression, local.attack.clients) == ("", 0.0)
    assert (local.local_steps, local.num_clients) == (c.local_steps, c.num_clients)
    pooled = round_setup.arm_config(c, ARMS["centralised"])
    assert (pooled.num_clients, pooled.clients_per_round) == (1, 1)
    assert pooled.local_steps == c.local_steps * c.clients_per_round
    assert pooled.federated.to_dict() == default_config().federated.to_dict()
    assert c.federated.compression == "int8"
    planned = {one.id: one.algorithm for one in planned_arms(c)}
    assert planned == {
        "base": "", "local": "local", "centralised": "fedavg", "fedex_lora/fl": "fedex_lora",
        "fedadam/fl": "fedadam",
    }  # fmt: skip
    assert {"base", "local", "centralised"} <= set(references(c)["fedadam/fl"])


def test_a_residue_has_room_for_all_that_a_run_adds():
    c = default_config()
    c.rounds, c.clients_per_round, c.lora_rank = 3, 4, 8
    assert round_setup.hyperparameters_of(c).residue_rank == 3 * 4 * 8
    c.federated.sampling = "poisson"  # a cohort may be everyone
    assert round_setup.hyperparameters_of(c).residue_rank == 3 * c.num_clients * 8
    c.federated.residue_rank = 5
    assert round_setup.hyperparameters_of(c).residue_rank == 5
