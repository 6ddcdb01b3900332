"""Safe LoRA in a run: which weights it reads, when it comes, and what is refused before compute."""

import shutil
import types

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fedsafe_jax import experiment
from fedsafe_jax.config import ConfigError, default_config
from fedsafe_jax.federated import safe_lora
from fedsafe_jax.federated.algorithms import ServerState
from fedsafe_jax.federated.mesh import make_mesh
from fedsafe_jax.federated.simulation import FederatedState
from fedsafe_jax.models import hub, lora
from fedsafe_jax.models.base_model import PACKAGED_FOLDER
from fedsafe_jax.pipeline import read_files, safe_lora_step
from fedsafe_jax.pipeline.arms import planned_arms
from fedsafe_jax.validation import validate

CHANGED = "model.layers.0.self_attn.v_proj.weight"


@pytest.fixture(scope="module")
def unaligned(tmp_path_factory):
    """The packaged model with another value projection in its first layer."""
    folder = tmp_path_factory.mktemp("unaligned")
    shutil.copy(PACKAGED_FOLDER / "config.json", folder)
    tensors = load_file(PACKAGED_FOLDER / "model.safetensors")
    change = np.random.default_rng(0).normal(size=tensors[CHANGED].shape)
    tensors[CHANGED] = (tensors[CHANGED] + 0.1 * change).astype(tensors[CHANGED].dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def config_of(folder, **changes):
    c = default_config()
    c.arms, c.export_arm, c.rounds, c.lora_rank = ("fl",), "fl", 2, 4
    c.federated.unaligned, c.federated.safe_lora_threshold = str(folder), 1.0
    c.update_from_flattened_dict(changes)
    return c


@pytest.fixture(scope="module")
def factors():
    shape = hub.read_config(PACKAGED_FOLDER)
    adapter = lora.LoraConfig(4, 8.0, ("q_proj", "v_proj"))
    shapes = jax.eval_shape(lambda: lora.init(jax.random.key(0), shape, adapter))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)


def moved_by(folder):
    ours, theirs = (load_file(x / "model.safetensors")[CHANGED] for x in (PACKAGED_FOLDER, folder))
    return ours.astype(np.float32) - theirs.astype(np.float32)


def test_projections_are_matched_with_their_weights(unaligned, factors):
    found, figures = safe_lora_step.run(config_of(unaligned), factors)
    pair, new = (x["layers"]["self_attn"] for x in (factors, found))
    v = pair["v_proj"]
    expected, cosine = safe_lora.project(v["a"][0], v["b"][0], moved_by(unaligned), 1.0)
    np.testing.assert_array_equal(new["v_proj"]["b"][0], expected)
    assert np.abs(expected - v["b"][0]).max() > 0.1
    np.testing.assert_array_equal(new["v_proj"]["b"][1:], v["b"][1:])
    for same, old in ((new["v_proj"]["a"], v["a"]), (new["q_proj"]["b"], pair["q_proj"]["b"])):
        np.testing.assert_array_equal(same, old)
    assert figures == {
        "projected": 1, "projections": 2 * len(v["b"]), "mean_cosine": pytest.approx(cosine)
    }  # fmt: skip


def test_it_comes_once_behind_the_last_aggregation(unaligned, factors):
    """The rounds themselves are a stand-in that leaves the adapter as it is."""
    mesh = make_mesh(jax.devices()[:1])
    state = FederatedState(ServerState(factors, (), ()), {"states": (), "residuals": ()})
    figures = {"useful_tokens": 1, "clients": [0], "no_data": [], "excluded": [], "skipped": False}
    federation = types.SimpleNamespace(train=lambda arm, state, clients, t: (state, dict(figures)))
    c = config_of(unaligned)
    arm = experiment.ArmRun(
        config=c, inputs=types.SimpleNamespace(mesh=mesh), clients=None, own=None,
        federation=federation, workdir=None, owner=None, progress=None, seed=0,
        planned=planned_arms(c)[0],
    )  # fmt: skip
    first, row, _ = arm._round(state, None, 0)
    assert first is state and "safe_lora" not in row
    last, row, _ = arm._round(state, None, 1)
    expected, figures = safe_lora_step.run(c, factors)
    jax.tree.map(np.testing.assert_array_equal, last.server.adapter, expected)
    assert row["safe_lora"] == figures and row["seconds"]["safe_lora"] > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: "package:model", "q_proj, v_proj are those of model='package:model', so"),
        (lambda folder: _without(folder, CHANGED), f"tensor '{CHANGED}' has shape None, and that"),
        (lambda folder: _without(folder, CHANGED, 3), f"tensor '{CHANGED}' has shape [3, "),
    ],
)
def test_another_model_is_refused_before_compute(unaligned, tmp_path, make, message):
    shutil.copytree(unaligned, tmp_path / "copy")
    with pytest.raises(ConfigError) as caught:
        safe_lora_step.Alignment(config_of(make(tmp_path / "copy")))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def _without(folder, name, rows=0):
    """A folder without a tensor, or with a few of its rows."""
    tensors = load_file(folder / "model.safetensors")
    whole = tensors.pop(name)
    if rows:
        tensors[name] = whole[:rows].copy()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_personal_models_are_refused():
    c = config_of("other", algorithms=("fedsa_lora",))
    with pytest.raises(ConfigError, match="unaligned='other' does not go with algorithm fedsa_lo"):
        validate(c)


def test_a_run_stops_where_the_unaligned_model_has_changed(unaligned):
    files = read_files.files_of(config_of(unaligned))
    assert files["federated.unaligned/model.safetensors"] == unaligned / "model.safetensors"
    assert not [name for name in read_files.files_of(default_config()) if "unaligned" in name]
