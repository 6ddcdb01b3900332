"""Every field of every config: it changes logits as in transformers, or not, or is refused.

The fields are those of transformers' own config classes, so a field that a later version adds has
to be given a value here, and to be read, named harmless, or refused.
"""

import dataclasses

import jax
import numpy as np
import pytest
from families import COMMON, GEMMA

from fedsafe_jax.models import config_fields, encoder_hub, hub
from fedsafe_jax.models.decoder import Decoder
from fedsafe_jax.models.decoder_config import FAMILIES, ModelError, from_hf
from fedsafe_jax.models.encoder import Classifier

TOLERANCE = 1e-4  # float32, orders of summation
SMALL = COMMON | {"num_hidden_layers": 2, "vocab_size": 61}
OWN = {
    "llama": {}, "mistral": {"sliding_window": 8}, "smollm3": {"no_rope_layers": [1, 0]},
    "qwen2": {}, "qwen3": {"head_dim": 16}, "gemma2": GEMMA, "gemma3_text": GEMMA,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
LINEAR = {"rope_type": "linear", "rope_theta": 1e3, "factor": 2.0}
KINDS = ["sliding_attention", "full_attention"]
# Values that no family has by default, by field; several where they may act differently.
VALUES = {
    "transformers_version": ["4.0.0"],
    "architectures": [["OtherForCausalLM"]],
    "output_hidden_states": [True],
    "output_attentions": [True],
    "return_dict": [False],
    "dtype": ["bfloat16"],
    "chunk_size_feed_forward": [4],
    "is_encoder_decoder": [True],
    "id2label": [{"0": "a", "1": "b", "2": "c"}],
    "label2id": [{"a": 0, "b": 1, "c": 2}],
    "problem_type": ["regression"],
    "vocab_size": [64],
    "hidden_size": [64],
    "intermediate_size": [80],
    "num_hidden_layers": [3],
    "num_attention_heads": [2, 8],
    "num_key_value_heads": [1, 4, None],
    "head_dim": [32],
    "hidden_act": ["gelu_pytorch_tanh", "relu"],
    "hidden_activation": ["silu", "gelu"],
    "max_position_embeddings": [256],
    "initializer_range": [0.5],
    "rms_norm_eps": [1e-2],
    "use_cache": [False],
    "pad_token_id": [5],
    "bos_token_id": [7],
    "eos_token_id": [8, [8, 9]],
    "pretraining_tp": [2],
    "tie_word_embeddings": [True],
    "rope_parameters": [LINEAR, YARN, DYNAMIC, PARTIAL],
    "attention_bias": [True],
    "attention_dropout": [0.5],
    "mlp_bias": [True],
    "sliding_window": [4],
    "use_sliding_window": [True],
    "max_window_layers": [1],
    "layer_types": [KINDS, KINDS[::-1], ["chunked_attention", "full_attention"]],
    "no_rope_layers": [[0, 1]],
    "no_rope_layer_interval": [2],
    "query_pre_attn_scalar": [40],
    "final_logit_softcapping": [2.0],
    "attn_logit_softcapping": [2.0],
    "use_bidirectional_attention": [True],
    # Fields that are none of the class's, though they may be meant to change something.
    "partial_rotary_factor": [0.5],
    "attention_multiplier": [0.5],
    "residual_multiplier": [0.5],
    "logits_scaling": [2.0],
    "rope_local_base_freq": [1e3],
    "qk_layernorm": [True],
    "some_new_field": [{"a": 1}],
}  # fmt: skip
# Some fields say something together with others only.
TOGETHER = {
    "max_window_layers": {"use_sliding_window": True, "sliding_window": 4},
    "no_rope_layer_interval": {"no_rope_layers": None},
    "tie_word_embeddings": {},
}


def classes():
    """Yields (family, field) of every family's class, and of fields that are none of its own."""
    transformers = pytest.importorskip("transformers")
    for family in FAMILIES:
        names = {f.name for f in dataclasses.fields(transformers.CONFIG_MAPPING[family])}
        yield family, sorted(names | VALUES.keys())


def test_every_field_has_a_value_to_try():
    missing = {
        name
        for family, names in classes()
        for name in names
        if name not in VALUES and not name.startswith("_")
    }
    assert not missing


def torch_logits(model_type, raw, tokens, folder):
    """Saves a random model of a config, and returns its logits."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **raw)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.15)
            if parameter.ndim == 1:
                parameter.add_(0.0 if model_type.startswith("gemma") else 0.8)
        model.save_pretrained(folder)
        # The dictionary's file, as a stranger may have written it.
        hub.write_json(folder / "config.json", {"model_type": model_type} | raw)
        model.config.return_dict = True  # False is no option of the body
        return model(torch.tensor(tokens)).logits.numpy()


def our_logits(folder, tokens):
    config = hub.read_config(folder)
    params = hub.load_params(folder, config, "float32")
    ones = np.ones_like(tokens)
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    with jax.disable_jit():
        return Decoder(config).apply({"params": params}, tokens, positions, ones, method="logits")


def refused(raw):
    """The error of a config, or None; this needs no weights."""
    try:
        from_hf(hub.hf_config(raw))
    except ModelError as error:
        return str(error)
    return None


def others_slow(families, now):
    """All families, of which those that are not in `now` are slow."""
    assert set(now) <= set(families)
    return [f if f in now else pytest.param(f, marks=pytest.mark.slow) for f in families]


@pytest.mark.parametrize("family", others_slow(FAMILIES, ("llama", "gemma3_text")))
def test_fields_of_decoders_are_computed_ignored_as_there_or_refused(tmp_path, family):
    pytest.importorskip("torch")
    names = dict(classes())[family]
    base = SMALL | OWN[family]
    tokens = np.random.default_rng(0).integers(1, 61, (1, 24))
    outcomes = {}
    for name in names:
        for i, value in enumerate(VALUES.get(name, ())):
            raw = base | TOGETHER.get(name, {}) | {name: value}
            raw = {k: v for k, v in raw.items() if not (k == "no_rope_layers" and v is None)}
            if name == "num_hidden_layers" and "no_rope_layers" in raw:
                raw["no_rope_layers"] = [1, 0, 1]
            if error := refused({"model_type": family} | raw):
                assert "\n" not in error
                outcomes[name, i] = "refused"
                continue
            folder = tmp_path / f"{name}{i}"
            expected = torch_logits(family, raw, tokens, folder)
            far = np.abs(our_logits(folder, tokens) - expected).max()
            outcomes[name, i] = "equal" if far < TOLERANCE else f"{value}: {far}"
    wrong = {k: v for k, v in outcomes.items() if v not in ("equal", "refused")}
    assert not wrong
    # The sweep is none if nothing passes, and the computations that are not here are refused.
    assert sum(x == "equal" for x in outcomes.values()) > 25
    for name in ("attention_multiplier", "logits_scaling", "some_new_field", "qk_layernorm"):
        assert outcomes[name, 0] == "refused"
    if family != "gemma3_text":  # whose fields are by kind of layer: these are read by no one
        assert outcomes["rope_parameters", 1] == outcomes["partial_rotary_factor", 0] == "refused"


ENCODER = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 1,
    "id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1},
}  # fmt: skip
MODERN = {"local_attention": 8, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2}
MODERN |= {"sep_token_id": 3}
ENCODER_OWN = {"roberta": {"type_vocab_size": 1}, "xlm-roberta": {"type_vocab_size": 1}}
ENCODER_OWN |= {"modernbert": MODERN}
ROTARY = {"full_attention": {"rope_type": "default", "rope_theta": 2e3}}
ROTARY |= {"sliding_attention": {"rope_type": "default", "rope_theta": 1e2}}
SCALED = ROTARY | {"full_attention": YARN}
ENCODER_VALUES = VALUES | {
    "num_attention_heads": [2],
    "pad_token_id": [0],
    "hidden_act": ["gelu_new", "silu"],
    "hidden_activation": ["silu"],
    "rope_parameters": [ROTARY, SCALED],
    "type_vocab_size": [3],
    "layer_norm_eps": [1e-2],
    "norm_eps": [1e-2],
    "norm_bias": [True],
    "hidden_dropout_prob": [0.5],
    "attention_probs_dropout_prob": [0.5],
    "embedding_dropout": [0.5],
    "mlp_dropout": [0.5],
    "classifier_dropout": [0.5],
    "classifier_pooling": ["mean"],
    "classifier_bias": [True],
    "classifier_activation": ["silu"],
    "decoder_bias": [False],
    "sparse_prediction": [True],
    "sparse_pred_ignore_index": [-1],
    "deterministic_flash_attn": [True],
    "initializer_cutoff_factor": [1.0],
    "is_decoder": [True],
    "add_cross_attention": [True],
    "local_attention": [4],
    "cls_token_id": [4],
    "sep_token_id": [5],
    "position_embedding_type": ["relative_key", "absolute"],
}


def encoder_logits(model_type, raw, tokens, folder):
    """Saves a random classifier of a config, and returns its logits."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **raw)
    model = AutoModelForSequenceClassification.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder)
        hub.write_json(folder / "config.json", {"model_type": model_type} | raw)
        model.config.return_dict = True  # False is no option of the body
        return model(torch.tensor(tokens)).logits.numpy()


@pytest.mark.parametrize("family", others_slow(encoder_hub.FAMILIES, ("bert",)))
def test_fields_of_encoders_are_computed_ignored_as_there_or_refused(tmp_path, family):
    pytest.importorskip("torch")
    from transformers import CONFIG_MAPPING

    own = {field.name for field in dataclasses.fields(CONFIG_MAPPING[family])}
    assert own <= ENCODER_VALUES.keys()
    base = ENCODER | ENCODER_OWN.get(family, {})
    tokens = np.random.default_rng(0).integers(6, 61, (1, 24))
    outcomes = {}
    more = {"some_new_field", "attention_multiplier", "position_embedding_type"}
    for name in sorted(own | more):
        for i, value in enumerate(ENCODER_VALUES[name]):
            raw, folder = base | {name: value}, tmp_path / f"{name}{i}"
            hub.write_json(tmp_path / "config.json", {"model_type": family} | raw)
            try:
                encoder_hub.read_config(tmp_path)
            except ModelError as error:
                assert "\n" not in str(error)
                outcomes[name, i] = "refused"
                continue
            expected = encoder_logits(family, raw, tokens, folder)
            config, params = encoder_hub.load_classifier(folder)
            with jax.disable_jit():
                ours = Classifier(config).apply(
                    {"params": params}, tokens, np.zeros_like(tokens), tokens > 0
                )
            far = np.abs(ours - expected).max()
            outcomes[name, i] = "equal" if far < TOLERANCE else f"{value}: {far}"
    wrong = {k: v for k, v in outcomes.items() if v not in ("equal", "refused")}
    assert not wrong
    assert sum(x == "equal" for x in outcomes.values()) > 20
    for name in ("some_new_field", "attention_multiplier", "position_embedding_type"):
        assert outcomes[name, 0] == "refused"


WRONG = {
    "hidden_size": "32", "num_hidden_layers": 0, "num_attention_heads": -4, "vocab_size": 2.5,
    "rope_theta": "a", "rope_scaling": "yarn", "rms_norm_eps": None, "num_key_value_heads": 3,
    "rope_parameters": [1], "intermediate_size": True, "head_dim": [8],
}  # fmt: skip


@pytest.mark.parametrize("field", WRONG)
def test_wrong_values_are_one_line(tmp_path, field):
    hub.write_json(
        tmp_path / "config.json", {"model_type": "llama"} | SMALL | {field: WRONG[field]}
    )
    with pytest.raises(ModelError, match="config.json: ") as error:
        hub.read_config(tmp_path)
    shown = "rope" if "rope" in field else field
    assert shown in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[1]", '"x"', "null", "3", "", "{", "[" * 9000])
def test_a_config_that_is_no_object_is_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    for read in (hub.read_config, encoder_hub.load_classifier):
        with pytest.raises(ModelError, match="config.json: (not JSON|holds a)") as error:
            read(tmp_path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "mxfp4", "compressed-tensors"])
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "bert"])
def test_quantised_weights_are_named_before_anything_else(tmp_path, method, family):
    raw = {"model_type": family, "quantization_config": {"quant_method": method}}
    hub.write_json(tmp_path / "config.json", raw)
    read = encoder_hub.load_classifier if family == "bert" else hub.read_config
    with pytest.raises(ModelError, match=f"quantised by {method}, which is not supported"):
        read(tmp_path)


def test_what_configs_on_the_hub_note_of_themselves_is_no_reason_to_refuse():
    notes = {
        "_name_or_path": "a/b", "torch_dtype": "bfloat16", "unsloth_fixed": True,
        "transformers.js_config": {"dtype": "q4"}, "is_llama_config": True, "pretraining_tp": 1,
        "rope_interleaved": False, "temperature": 0.6, "quantization_config": None,
        "rope_scaling": None, "architectures": ["LlamaForCausalLM"], "use_mrope": False,
    }  # fmt: skip
    config_fields.check_quantised(notes)
    assert refused({"model_type": "llama"} | SMALL | notes) is None
