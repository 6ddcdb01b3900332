"""Folders of strangers that claim anything: one line at once, and nothing elsewhere is opened."""

import json
import shutil
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fedsafe_jax.inference.pretrained import load_pretrained
from fedsafe_jax.models import base_model, encoder_hub, expressions, hub, lora, model_files
from fedsafe_jax.models.decoder_config import ModelError
from fedsafe_jax.validation import one_line

INF, NAN = float("inf"), float("nan")


@pytest.fixture
def folder(tmp_path):
    """The packaged model in a folder of its own."""
    return shutil.copytree(base_model.PACKAGED_FOLDER, tmp_path / "model")


def change(path, **fields):
    raw = json.loads(path.read_text()) | fields
    path.write_text(json.dumps(raw))


def refused(call, *said, seconds=30.0):
    """Asserts that a call is refused in one short line, soon."""
    start = time.monotonic()
    with pytest.raises(ModelError) as caught:
        call()
    assert time.monotonic() - start < seconds
    message = one_line(caught.value)
    assert message.isprintable() and len(message) < 700 and "\n" not in str(caught.value), message
    assert all(word in message for word in said), message


SIZES = (
    "num_hidden_layers num_attention_heads num_key_value_heads hidden_size intermediate_size "
    "vocab_size max_position_embeddings head_dim"
).split()
CLAIMS = (10**7, 10**12, 0, -1, "4", 4.5, True, [4], {"a": 1}, INF, NAN, 10**400)


@pytest.mark.parametrize("field", SIZES)
def test_sizes_that_no_model_has_are_one_line_before_anything_is_made(folder, field):
    hub.read_config(folder)  # imports transformers, which takes seconds
    for claim in CLAIMS:
        if (field, claim) in (("max_position_embeddings", 10**7), ("head_dim", 0)):
            continue  # the one is in use; the other is how some configs say "by the heads"
        shutil.copy(base_model.PACKAGED_FOLDER / "config.json", folder)
        change(folder / "config.json", **{field: claim})
        refused(lambda: load_pretrained(folder), str(folder))


@pytest.mark.parametrize("field", ["num_labels", "type_vocab_size", "num_hidden_layers"])
def test_encoders_that_claim_too_much_are_one_line(tmp_path, field):
    config = {"model_type": "bert", "hidden_size": 8, "num_attention_heads": 2} | {field: 10**9}
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(lambda: encoder_hub.load_classifier(tmp_path), field)


def test_an_encoder_takes_no_memory_that_its_tensors_have_not(tmp_path):
    """The claims are each plausible; together they are 70 terabytes."""
    config = {
        "model_type": "bert", "hidden_size": 2**18, "num_attention_heads": 64,
        "vocab_size": 2**24, "num_hidden_layers": 1, "intermediate_size": 2**20,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    names = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    tensors = {f"embeddings.{name}.weight": np.ones((4, 4), np.float32) for name in names}
    save_file(tensors, tmp_path / "model.safetensors")
    refused(lambda: encoder_hub.load_classifier(tmp_path), str(tmp_path), seconds=30)


MAPS = (
    None, [], {}, 7, "model.safetensors", {"a": None}, {"a": 7}, {"a": ["b"]},
    {"a": "../outside.safetensors"}, {"a": "/etc/passwd"}, {"a": "sub/x.safetensors"}, {"a": ".."},
    {"a": ""}, {"a": "nowhere.safetensors"}, {7: {"b": 1}},
)  # fmt: skip


@pytest.mark.parametrize("weight_map", MAPS)
def test_an_index_opens_nothing_outside_its_folder(folder, weight_map, monkeypatch):
    shutil.copy(folder / "model.safetensors", folder.parent / "outside.safetensors")
    (folder / hub.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    opened, real = [], model_files.safe_open

    def recorded(path, **options):
        opened.append(path)
        return real(path, **options)

    monkeypatch.setattr(model_files, "safe_open", recorded)
    refused(lambda: load_pretrained(folder), str(folder))
    assert all(path.parent == folder for path in opened)


@pytest.mark.parametrize(
    "content", ["[]", "null", "7", "{", "", "[" * 99_999, '{"a":' + "9" * 5000]
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_files_that_hold_no_object_are_one_line(folder, name, content):
    (folder / name).write_text(content)
    refused(lambda: load_pretrained(folder), str(folder))


def test_a_file_that_is_too_large_is_not_read(folder, monkeypatch):
    monkeypatch.setattr(model_files, "MOST_BYTES", 100)
    refused(lambda: hub.read_config(folder), "at most 100")


@pytest.mark.parametrize("number", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_weights_that_are_not_finite_are_refused(folder, number, name):
    tensors = dict(load_file(folder / "model.safetensors"))
    tensors[name] = tensors[name].copy()
    tensors[name].flat[-1] = number
    save_file(tensors, folder / "model.safetensors")
    for options in ({}, {"dtype": "bfloat16"}, {"quantization": "int8"}):
        refused(lambda options=options: load_pretrained(folder, **options), name, "not finite")


@pytest.fixture
def adapter(tmp_path):
    """An adapter of the packaged model."""
    config = lora.LoraConfig(rank=2, alpha=4.0, targets=("q_proj", "v_proj"))
    pair = {"a": np.ones((2, 8, 2), np.float32), "b": np.ones((2, 2, 8), np.float32)}
    factors = {"layers": {"self_attn": {"q_proj": pair, "v_proj": pair}}}
    lora.save_adapter(lora.Adapter(factors, config, "org/model"), tmp_path / "adapter")
    return tmp_path / "adapter"


FIELDS = {
    "r": (0, -4, "4", None, 10**9, 2.0, True, [2]),
    "lora_alpha": (None, INF, NAN, 0, -8, 1e9, "4", [4], True),
    "lora_dropout": (1, -0.1, "a", NAN, [0]),
    "target_modules": (7, [], [7], "(", "x" * 20_000, {"a": 1}),
    "peft_type": (7, ["LORA"], "PROMPT_TUNING"),
    "base_model_name_or_path": (7, ["a"], {"a": 1}),
    "auto_mapping_of_mine": ({"a": 1},),
}


@pytest.mark.parametrize("field", FIELDS)
def test_adapters_that_claim_nonsense_are_one_line(adapter, field):
    intact = (adapter / "adapter_config.json").read_text()
    for value in FIELDS[field]:
        (adapter / "adapter_config.json").write_text(intact)
        change(adapter / "adapter_config.json", **{field: value})
        refused(lambda: lora.load_adapter(adapter), "adapter_config.json", field[:4])


@pytest.mark.parametrize("content", ["[]", "null", '"r"', "{", "[" * 99_999])
def test_adapter_configs_that_are_no_objects_are_one_line(adapter, content):
    (adapter / "adapter_config.json").write_text(content)
    refused(lambda: lora.load_adapter(adapter), "adapter_config.json")


def whole(tensors, name):
    tensors[name] = np.ones(tensors[name].shape, np.int32)


def huge(tensors, name):
    tensors[name] = np.full_like(tensors[name], 3e38)


def infinite(tensors, name):
    tensors[name] = np.full_like(tensors[name], np.inf)


def renumbered(tensors, name):
    tensors[name.replace("layers.0", "layers." + "9" * 5000)] = tensors.pop(name)


@pytest.mark.parametrize("edit", [whole, huge, infinite, renumbered])
def test_factors_that_are_no_factors_are_one_line(adapter, edit):
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors, min(tensors))
    save_file(tensors, path)
    refused(lambda: lora.load_adapter(adapter), "adapter_model.safetensors")


def test_an_expression_that_never_ends_is_stopped(adapter, monkeypatch):
    monkeypatch.setattr(expressions, "SECONDS", 2.0)
    change(adapter / "adapter_config.json", target_modules=r"(([\w.])+)+!")
    refused(lambda: lora.load_adapter(adapter), "takes more than 2 seconds", seconds=20)


def test_an_expression_that_ends_matches_as_in_this_process():
    names = {"model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"}
    assert expressions.matching(r".*\.(q|v)_proj", names) == {"model.layers.1.self_attn.q_proj"}
    with pytest.raises(expressions.ExpressionError, match="unterminated"):
        expressions.matching("(", names)
