"""Who did it: clients' models in one batch against one by one, planted attackers, whole runs."""

import copy
import itertools
import json
import shutil
import types

import jax
import numpy as np
import pytest
from etils import epath
from families import checkpoint as random_model
from jax.flatten_util import ravel_pytree

from fedsafe_jax import experiment, load_pretrained
from fedsafe_jax.config import ConfigError, default_config
from fedsafe_jax.data import chat
from fedsafe_jax.data.examples import Example
from fedsafe_jax.evals.tasks import divergence
from fedsafe_jax.federated import lora_average, simulation
from fedsafe_jax.federated.algorithms import ServerState
from fedsafe_jax.federated.mesh import make_mesh
from fedsafe_jax.filters.actions import FilterCounts
from fedsafe_jax.models import lora
from fedsafe_jax.models.adapter_hash import adapter_hash
from fedsafe_jax.models.base_model import model_folder
from fedsafe_jax.pipeline import attribution, clients, harm_by_client, round_setup
from fedsafe_jax.pipeline.arms import planned_arms
from fedsafe_jax.pipeline.inputs import load_inputs
from fedsafe_jax.pipeline.refusal_probe import PROBE_TOKENS
from fedsafe_jax.pipeline.workdir import HASH
from fedsafe_jax.runtime import checkpoint
from fedsafe_jax.runtime.progress import Progress
from fedsafe_jax.validation import validate

LORA = lora.LoraConfig(2, 4.0, ("q_proj", "down_proj"))
DIALOGUES = (
    (("user", "How do I tie a knot?"),),
    (("user", "Hello."), ("assistant", "Hi."), ("user", "Name three colours of the rainbow.")),
    (("user", "Why?"),),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama of 32 hidden units that speaks the packaged tokenizer."""
    folder, packaged = tmp_path_factory.mktemp("tiny"), model_folder("package:model")
    vocabulary = json.loads((packaged / "config.json").read_text())["vocab_size"]
    random_model("smollm2", folder, vocab_size=vocabulary, num_hidden_layers=2)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(packaged / name, folder / name)
    return str(folder)


def factors_of(lm, seed):
    fresh = lora.init(jax.random.key(seed), lm.config, LORA)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.float32(x + rng.normal(0, 0.1, x.shape)), fresh)


def odd(dialogues, answers):
    """A judge that says both things of a random model's answers."""
    return [len(answer) % 2 == 1 for answer in answers]


def test_one_batch_measures_what_one_by_one_does(folder):
    """Three clients, two at once, under a server with a residue."""
    lm = load_pretrained(folder)
    config = default_config()
    config.federated.attribution, config.clients_per_round = 16, 2
    mesh = make_mesh(jax.devices()[:1])
    inputs = types.SimpleNamespace(
        lm=lm, mesh=mesh, lora=LORA, red_team=[Example(d, "", "") for d in DIALOGUES]
    )
    none = FilterCounts(*[0] * len(FilterCounts._fields))
    counts = {i: none._replace(kept=5, dropped=i, rewritten=1) for i in (3, 4, 7)}
    measured = attribution.Attribution(config, inputs, counts)
    measured._refuses = odd
    start, residue = factors_of(lm, 0), factors_of(lm, 1)
    server = simulation.replicate(ServerState(start, (), (), residue), mesh)
    updates = {
        i: np.float32(np.random.default_rng(i).normal(0, 0.1, ravel_pytree(start)[0].size))
        for i in (7, 3, 4)
    }
    beside = {}
    receive = measured.receiver(beside.__setitem__)
    for i, update in updates.items():
        receive(i, update)
    assert beside.keys() == updates.keys()
    row = measured.measure(server)
    assert row["clients"] == [3, 4, 7] and row["prompts"] == 3
    assert row["filter"] == {"kept": [5, 5, 5], "flagged": [4, 5, 8], "dropped": [3, 4, 7]}

    flat, unravel = ravel_pytree(start)
    config_of_both = lora.config_of(lora_average.join(start, residue), LORA)
    models = [
        lm.with_adapter(
            lora.Adapter(lora_average.join(unravel(flat + update), residue), config_of_both)
        )
        for update in (0 * flat, updates[3], updates[4], updates[7])
    ]
    assert config_of_both.rank == 4 and config_of_both.scale == LORA.scale
    said = [m.answer_dialogues(DIALOGUES, PROBE_TOKENS)[0] for m in models]
    rates = [100 * np.mean(odd(DIALOGUES, answers)) for answers in said]
    assert len(set(map(tuple, said))) == 4 and len(set(rates)) > 1
    assert [row["global_refused"], *row["refused"]] == rates
    assert row["refusal_lost"] == [rates[0] - rate for rate in rates[1:]]
    encoded = [
        chat.without_end(lm.tokenizer, chat.encode(lm.tokenizer, d, a, config.eval.max_length))
        for d, a in zip(DIALOGUES, said[0], strict=True)
    ]
    for value, model in zip(row["divergence"], models[1:], strict=True):
        alone = divergence.by_position(
            model, models[0], encoded, config.eval.max_length, divergence.EARLY
        )
        # Float32 sums of other shapes; log-probabilities of some tens agree within 1e-5.
        assert value == pytest.approx(np.nanmean(alone, 1).mean(), rel=1e-3, abs=1e-5) and value > 0
    # The next round begins without these, and a round without a client asks nothing.
    measured.receiver(None)
    nothing = measured.measure(server)
    assert nothing["clients"] == nothing["refused"] == [] and nothing["global_refused"] is None


def planted(seed, t, malicious=(1, 4)):
    """A row of metrics in which malicious clients lose refusal, and the others are alike."""
    rng = np.random.default_rng((seed, t))
    ids = sorted(rng.permutation(6)[:4].tolist())
    bad = np.isin(ids, malicious)
    level = 10.0**-t  # lengths and divergences fall with the learning rate
    return {
        "arm": "fl", "seed": seed, "round": t, "clients": [*ids, 9],
        "delta_norms": [*(level * rng.uniform(1, 2, 4)).tolist(), None],
        "cosines": [*rng.uniform(0, 1, 4).tolist(), None],
        "malicious": [i for i, m in zip(ids, bad, strict=True) if m],
        "attribution": {
            "prompts": 8, "global_refused": 100.0, "clients": ids,
            "refused": (100 - 50.0 * bad).tolist(), "refusal_lost": (50.0 * bad).tolist(),
            "divergence": (level * (rng.uniform(1, 2, 4) + 3 * bad)).tolist(),
        },
    }  # fmt: skip


def test_planted_attackers_are_ranked_first():
    rows = [planted(seed, t) for seed in (0, 1) for t in range(3)]
    rows.append({"arm": "base", "seed": 0, "round": 0})
    arm = harm_by_client.summarise(rows)["fl"]
    took_part = [i for t in range(3) for i in rows[t]["attribution"]["clients"]]
    first = [line for line in arm["clients"] if line["seed"] == 0]
    assert {line["client"]: line["rounds"] for line in first} == {
        i: took_part.count(i) for i in sorted(set(took_part))
    }
    assert all(line["malicious"] == (line["client"] in (1, 4)) for line in arm["clients"])
    for name in ("refusal_lost", "divergence"):
        assert arm["signals"][name]["auroc"] == 1.0 and arm["signals"][name]["ci95"][1] == 1.0
        assert arm["signals"][name]["per_seed"] == [1.0, 1.0]
        assert 0 < arm["signals"][name]["ci95"][0] < 1
    # By pairs of clients, in their own words: less cosine is suspicious.
    areas = []
    for seed in (0, 1):
        mine = [line for line in arm["clients"] if line["seed"] == seed]
        bad, good = ([x["cosine"] for x in mine if x["malicious"] == m] for m in (True, False))
        areas.append(np.mean([b < g for b, g in itertools.product(bad, good)]))
    assert arm["signals"]["cosine"]["auroc"] == pytest.approx(np.mean(areas))
    assert "flagged" not in arm["signals"] and len(arm["signals"]["norm"]["by_round"]) == 3
    # A length is that beside the round's median.
    of_client = [
        row["delta_norms"][row["clients"].index(1)] / np.median(row["delta_norms"][:4])
        for row in rows[:3]
        if 1 in row["clients"]
    ]
    (line,) = [line for line in first if line["client"] == 1]
    assert line["relative_norm"] == pytest.approx(np.mean(of_client))


def test_without_known_attackers_there_is_a_table_alone():
    row = copy.deepcopy(planted(0, 0))
    del row["malicious"]
    row["attribution"]["divergence"][0] = None
    row["attribution"]["filter"] = {
        "kept": [0, 3, 3, 3],
        "flagged": [0, 1, 1, 1],
        "dropped": [0] * 4,
    }
    summary = harm_by_client.summarise([row])["fl"]
    assert summary.keys() == {"clients"}
    assert summary["clients"][0]["relative_divergence"] is None
    assert [line["flagged_share"] for line in summary["clients"]] == [None, 0.25, 0.25, 0.25]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"federated.noise_multiplier": 1.0, "federated.clip_norm": 1.0},
            "federated.attribution=8 does not go with noise_multiplier: it looks at each client's",
        ),
        ({"algorithms": ("fedsa_lora",), "arms": ("fl",)}, "does not go with algorithm fedsa_lora"),
        ({"arms": ("base", "local")}, "no arm of ('base', 'local') is a federation"),
        ({"cai.red_team_sources": ()}, "it asks cai.red_team_sources; give some"),
        ({"federated.attribution": -1}, "federated.attribution=-1: expected at least 0"),
    ],
)
def test_what_has_no_single_updates_is_refused(changes, message):
    c = default_config()
    c.update_from_flattened_dict({"federated.attribution": 8} | changes)
    with pytest.raises(ConfigError) as caught:
        validate(c)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def rows_of(workdir):
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in rows
    ]


def test_a_run_trains_as_without_and_a_resumed_one_measures_the_same(folder, tmp_path, monkeypatch):
    def config(count):
        c = default_config()
        c.model, c.arms, c.export_arm, c.eval.tasks = folder, ("fl",), "fl", ("utility",)
        c.rounds, c.local_steps, c.batch_size, c.seq_len = 2, 1, 2, 64
        c.num_clients, c.clients_per_round, c.examples_per_client = 4, 3, 4
        c.attack.clients, c.attack.boost, c.eval.max_heldout = 0.5, 2.0, 2
        c.federated.attribution = count
        return c

    make, programs = round_setup.build, []

    def build(*arguments):
        """Builds the programs once: to trace them anew takes longer than the rounds."""
        programs[:] = programs or [make(*arguments)]
        return programs[0]

    monkeypatch.setattr(round_setup, "build", build)
    off, on, inputs = epath.Path(tmp_path / "off"), tmp_path / "on", load_inputs(config(0))
    without = experiment.ArmRun(
        config=config(0), inputs=inputs, clients=clients.build(config(0), inputs, 0, Progress(2)),
        own=None, federation=experiment.SIMULATED, workdir=off, owner=None, progress=Progress(2),
        seed=0, planned=planned_arms(config(0))[0],
    )  # fmt: skip
    trained = adapter_hash(without.train())
    save = checkpoint.RoundCheckpoints.save

    def killed(self, done, state):
        if done == 2:  # its line is written by then
            raise KeyboardInterrupt
        save(self, done, state)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint.RoundCheckpoints, "save", killed)
        experiment.run(config(2), str(on), inputs)
    before = rows_of(on)
    results = experiment.run(config(2), str(on), inputs)
    rows = rows_of(on)
    assert rows == before and len(rows) == 2
    assert results["arms"]["fl"][HASH] == [trained]
    harm = [row.pop("attribution") for row in rows]
    # The ledger's line of a round is of this run, whose metrics it covers.
    alike = [{k: v for k, v in row.items() if k != "ledger"} for row in (*rows, *rows_of(off))]
    assert alike[:2] == alike[2:]
    assert [h["clients"] for h in harm] == [sorted(row["clients"]) for row in rows]
    assert all(h["prompts"] == 2 and min(h["divergence"]) > 0 for h in harm)
    signals = results["attribution"]["fl"]["signals"]
    assert signals.keys() == {"refusal_lost", "divergence", "norm", "cosine"}
    assert all(0 <= one["auroc"] <= 1 for one in signals.values())
    report = (on / "report.html").read_text()
    assert "<h2>Who did it</h2>" in report and "(malicious)" in report
    assert (on / "figures/attribution.png").is_file()
