"""PEFT's adapter folders: every field of its config is plain, harmless, or refused by name."""

import dataclasses
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from families import VOCAB, checkpoint
from safetensors.numpy import load_file, save_file

from fedsafe_jax.models import hub, lora
from fedsafe_jax.models.decoder import Decoder
from fedsafe_jax.models.decoder_config import ModelError

TOKENS = np.random.default_rng(0).integers(0, VOCAB, (1, 12))
# Values that a plain LoRA does not have, for every field of peft's LoraConfig.
VALUES = {
    "task_type": ["SEQ_CLS"],
    "peft_type": ["IA3"],
    "auto_mapping": [{"base_model_class": "X"}],
    "peft_version": ["9.9"],
    "base_model_name_or_path": ["org/model"],
    "revision": ["main"],
    "inference_mode": [True, False],
    "r": [7],
    "target_modules": [["q_proj", "v_proj"]],
    "exclude_modules": [["v_proj"]],
    "lora_alpha": [13],
    "lora_dropout": [0.1],
    "fan_in_fan_out": [True],
    "bias": ["all", "lora_only"],
    "use_rslora": [True],
    "modules_to_save": [["lm_head"]],
    "init_lora_weights": [
        False, "gaussian", "orthogonal", "eva", "olora", "pissa", "pissa_niter_4", "corda",
        "loftq", "lora_ga", "some_new_one",
    ],
    "layers_to_transform": [[0]],
    "layers_pattern": ["layers"],
    "rank_pattern": [{"q_proj": 2}],
    "alpha_pattern": [{"q_proj": 2}],
    "megatron_config": [{"a": 1}],
    "megatron_core": ["other.core"],
    "trainable_token_indices": [[1]],
    "loftq_config": [{"loftq_bits": 4}],
    "eva_config": [{"rho": 2.0}],
    "corda_config": [{"corda_method": "kpm"}],
    "lora_ga_config": [{"direction": "x"}],
    "use_dora": [True],
    "velora_config": [{"a": 1}],
    "alora_invocation_tokens": [[9]],
    "use_qalora": [True],
    "qalora_group_size": [8],
    "monteclora_config": [{"a": 1}],
    "layer_replication": [[[0, 1]]],
    "runtime_config": [{"ephemeral_gpu_offload": True}],
    "lora_bias": [True],
    "target_parameters": [["mlp.experts"]],
    "use_bdlora": [{"a": 1}],
    "arrow_config": [{"a": 1}],
    "kasa_config": [{"a": 1}],
    "ensure_weight_tying": [True],
    # Of none of its versions.
    "some_new_field": [True, 3, "x", {"a": 1}],
}  # fmt: skip
# Fields whose value is read; where it is not that of the tensors, the folder is refused.
READ = {"lora_alpha", "use_rslora", "target_modules", "base_model_name_or_path", "lora_dropout"}
NOTES = {"auto_mapping", "peft_version", "revision", "inference_mode", "megatron_core"}
NOTES |= {"qalora_group_size", "runtime_config"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A base and a plain adapter that peft made, its factors random."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("peft")
    base = checkpoint("llama3.2", folder / "base")
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=4, lora_alpha=5, target_modules=["q_proj", "v_proj"], init_lora_weights=False,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    peft.get_peft_model(base, config).save_pretrained(folder / "adapter")
    return folder


def change(saved, folder, edit=None, **fields):
    """Copies the adapter with other fields and, by `edit`, other tensors."""
    shutil.copytree(saved / "adapter", folder)
    path = folder / "adapter_config.json"
    raw = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))
    if edit:
        tensors = load_file(folder / "adapter_model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def ours(saved, folder):
    adapter = lora.load_adapter(folder)
    config = hub.read_config(saved / "base")
    lora.check_base(adapter, config)
    variables = {"params": hub.load_params(saved / "base", config, "float32")}
    positions = np.broadcast_to(np.arange(TOKENS.shape[1]), TOKENS.shape)
    with jax.disable_jit():
        return Decoder(config, adapter.config.scale).apply(
            variables | {"lora": adapter.factors}, TOKENS, positions, np.ones_like(TOKENS),
            method="logits",
        )  # fmt: skip


def theirs(saved, folder):
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(saved / "base", dtype=torch.float32)
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(base, folder)(torch.tensor(TOKENS)).logits.numpy()


def test_every_field_of_peft_has_a_value_to_try():
    peft = pytest.importorskip("peft")
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} <= VALUES.keys()


@pytest.mark.parametrize("field", VALUES)
def test_a_field_is_read_harmless_or_refused_by_name(saved, tmp_path, field):
    for i, value in enumerate(VALUES[field]):
        folder = change(saved, tmp_path / str(i), **{field: value})
        try:
            lora.load_adapter(folder)
        except ModelError as error:
            assert f"{field}=" in str(error) and "\n" not in str(error)
            harmless = field in READ | NOTES or value in (False, "gaussian", "orthogonal")
            assert not harmless
            continue
        assert field in READ | NOTES or field == "init_lora_weights"
        expected = theirs(saved, folder)
        np.testing.assert_allclose(ours(saved, folder), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("field", "value"),
    [("some_new_field", x) for x in (None, False, [], {}, "")] + [("layers_to_transform", None)],
)
def test_what_asks_for_nothing_is_harmless(saved, tmp_path, field, value):
    assert lora.load_adapter(change(saved, tmp_path / "a", **{field: value})).config.rank == 4


def test_pissa_converted_to_a_plain_adapter_loads(saved, tmp_path):
    """Peft writes what was taken out of the base into the factors, of twice the rank."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(saved / "base", dtype=torch.float32)
    config = peft.LoraConfig(
        r=4, lora_alpha=5, target_modules=["q_proj"], init_lora_weights="pissa",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = peft.get_peft_model(base, config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        expected = model(torch.tensor(TOKENS)).logits.numpy()
    model.save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    assert lora.load_adapter(tmp_path / "plain").config.rank == 8
    np.testing.assert_allclose(ours(saved, tmp_path / "plain"), expected, atol=1e-4)


STEM = f"{lora.PEFT_PREFIX}.1.self_attn.v_proj"


def wide(tensors):
    tensors[f"{STEM}.lora_A.weight"] = np.zeros((5, 32), np.float32)


def fp8(tensors):
    key = f"{STEM}.lora_A.weight"
    tensors[key] = tensors[key].astype(ml_dtypes.float8_e4m3fn)


def of_some_layers(tensors):
    for key in [k for k in tensors if ".layers.0." not in k]:
        del tensors[key]


def without_v(tensors):
    for key in [k for k in tensors if "v_proj" in k]:
        del tensors[key]


BROKEN = {
    "r missing": ({"r": ...}, None, r"adapter_config.json: field r is missing"),
    "r null": ({"r": None}, None, r"adapter_config.json: field r is missing"),
    "r text": ({"r": "4"}, None, r"adapter_config.json: r='4'"),
    "r true": ({"r": True}, None, r"adapter_config.json: r=True"),
    "r other": (
        {"r": 16},
        None,
        r"q_proj.lora_A.weight' has shape .* adapter_config.json says r=16",
    ),
    "r of one": ({}, wide, rf"'{STEM}.lora_A.weight' has shape \[5, 32\].* r=4"),
    "alpha missing": ({"lora_alpha": ...}, None, "field lora_alpha is missing"),
    "alpha text": ({"lora_alpha": "x"}, None, "lora_alpha='x'"),
    "alpha nan": ({"lora_alpha": float("nan")}, None, "lora_alpha=nan"),
    "dropout": ({"lora_dropout": 1.5}, None, "lora_dropout=1.5"),
    "no targets": ({"target_modules": ...}, None, "field target_modules is missing"),
    "no A": ({}, lambda t: t.pop(f"{STEM}.lora_A.weight"), f"'{STEM}.lora_A.weight' is missing"),
    "no B": ({}, lambda t: t.pop(f"{STEM}.lora_B.weight"), f"'{STEM}.lora_B.weight' is missing"),
    "fp8": ({}, fp8, f"'{STEM}.lora_A.weight' has type F8_E4M3"),
    "nan": ({}, lambda t: t[f"{STEM}.lora_B.weight"].fill(np.nan), "v_proj.*not finite"),
    "no v_proj": ({}, without_v, r"no factors of model.layers.0.self_attn.v_proj.*target_modules"),
    "v_proj unnamed": ({"target_modules": ["q_proj"]}, None, "v_proj, which .* does not name"),
    "head named": ({"target_modules": ["q_proj", "v_proj", "lm_head"]}, None, "'lm_head'"),
    "all-linear": ({"target_modules": "all-linear"}, None, "no factors of .*target_modules"),
    "no expression": ({"target_modules": "("}, None, "no regular expression"),
    "one layer": ({}, of_some_layers, "layers_to_transform"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_config_and_tensors_that_disagree_are_one_line(saved, tmp_path, name):
    fields, edit, message = BROKEN[name]
    folder = change(saved, tmp_path / "adapter", edit, **fields)
    with pytest.raises(ModelError, match=message) as error:
        lora.check_base(lora.load_adapter(folder), hub.read_config(saved / "base"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "targets",
    [
        r".*self_attn\.(q_proj|v_proj)",
        ["self_attn.q_proj", "v_proj"],
        [f"model.layers.{i}.self_attn.{x}_proj" for i in range(3) for x in "qv"],
    ],
)
def test_targets_in_other_words_load(saved, tmp_path, targets):
    folder = change(saved, tmp_path / "adapter", target_modules=targets)
    assert lora.load_adapter(folder).config.targets == ("q_proj", "v_proj")
