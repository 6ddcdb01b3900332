"""`filter.json` and tensors of strangers: one line before memory is taken by them."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fedsafe_jax.filters import classifier, guard, protocol, store
from fedsafe_jax.inference.pretrained import load_pretrained
from fedsafe_jax.models import base_model, lora
from fedsafe_jax.models.decoder_config import ModelError
from fedsafe_jax.models.encoder import Classifier, EncoderConfig
from fedsafe_jax.models.tokenizer_loading import read_tokenizer
from fedsafe_jax.validation import one_line

REFUSED = (protocol.FilterError, ModelError)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A classifier as it is drawn, on disk."""
    config = EncoderConfig(vocab_size=2048, hidden_size=16, num_heads=2, intermediate_size=32)
    blank = np.zeros((1, 8), np.int32)
    key = jax.random.key(0)
    params = Classifier(config).init(key, blank, blank, blank == 0)["params"]
    tokenizer = read_tokenizer(base_model.PACKAGED_FOLDER)
    folder = tmp_path_factory.mktemp("filter") / "c"
    store.save(classifier.ClassifierFilter(config, params, tokenizer, max_length=64), folder)
    return folder


def refused(folder, said=""):
    with pytest.raises(REFUSED) as caught:
        store.load(folder)
    message = one_line(caught.value)
    assert said in message and len(message) < 700 and "(" not in said, message


def test_what_was_written_comes_back(made):
    there = store.load(made)
    assert there.config.hidden_size == 16 and there.unsafe_classes == (1,)


ENCODER = {
    "some_new_field": [1],
    "num_layers": [0, -1, 10**7, "2", None, 2.0, True, [2]],
    "hidden_size": [0, 2**40, 17, "16"],
    "num_heads": [0, 5, 10**9],
    "vocab_size": [0, 2**40, None, 100],
    "intermediate_size": [10**12, 7],
    "max_length": [10**12, 0],
    "num_labels": [0, 1, 10**9, 3],
    "num_types": [-1, 10**9],
    "dropout": [2.0, "a", float("nan")],
    "norm_epsilon": [float("inf"), -1, None],
    "activation": ["tanh", 7, None, ["gelu"]],
    "pooling": ["last", {}],
    "head": ["big"],
    "use_bias": [1, "yes", None],
    "rotary_thetas": [7, [1], [0, 1], ["a", "b"], [float("inf"), 1]],
    "local_layers": [7, [10**9], ["a"], [[0]]],
    "window": [-1, "a"],
    "platform": ["tpu"],
}


@pytest.mark.parametrize("field", ENCODER)
def test_encoders_that_claim_anything_are_one_line(made, tmp_path, field):
    folder = shutil.copytree(made, tmp_path / "c")
    about = json.loads((made / "filter.json").read_text())
    for value in ENCODER[field]:
        encoder = about["encoder"] | {field: value}
        (folder / "filter.json").write_text(json.dumps(about | {"encoder": encoder}))
        refused(folder)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "holds no config.json"),
        ({"word_embedding_dimension": 384}, "model_type 'none given' is not supported"),
        ({"model_type": "llama"}, "model_type 'llama' is not supported"),
    ],
)
def test_a_folder_without_an_encoder_is_one_line_before_any_compute(tmp_path, content, said):
    """Sentence transformers keep such files beside the encoder's own (`1_Pooling`)."""
    if content is not None:
        (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(REFUSED) as caught:
        store.check_folders("", str(tmp_path))
    assert said in one_line(caught.value)


OTHERS = {
    "encoder": [None, [], 7, {}, "a"],
    "unsafe_classes": [None, [], [0, 1], [2], ["1"], [[1]], 1, [True]],
    "max_length": [None, 0, -1, "64", 10**12, 2.5],
    "kind": [None, 7, "none", []],
}


@pytest.mark.parametrize("field", OTHERS)
def test_fields_that_hold_anything_are_one_line(made, tmp_path, field):
    folder = shutil.copytree(made, tmp_path / "c")
    about = json.loads((made / "filter.json").read_text())
    for value in OTHERS[field]:
        (folder / "filter.json").write_text(json.dumps(about | {field: value}))
        refused(folder)


def nan(tensors, name):
    tensors[name] = np.full_like(tensors[name], np.nan)


def whole(tensors, name):
    tensors[name] = np.ones(tensors[name].shape, np.int32)


def other_shape(tensors, name):
    tensors[name] = np.ones((3, 3, 3), np.float32)


def renamed(tensors, name):
    tensors[f"{name}x"] = tensors.pop(name)


def nested(tensors, name):
    tensors[f"{name}/x"] = tensors[name]


@pytest.mark.parametrize("edit", [nan, whole, other_shape, renamed, nested])
def test_weights_that_are_none_are_one_line(made, tmp_path, edit):
    folder = shutil.copytree(made, tmp_path / "c")
    tensors = dict(load_file(folder / classifier.TENSORS))
    edit(tensors, max(tensors))
    save_file(tensors, folder / classifier.TENSORS)
    refused(folder, "tensor")


GUARDS = {"base_model": [None, 7, "", []], "template": [None, 7, "mine"], "max_length": ["a", -1]}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A guard's folder, whose adapter names another base than filter.json."""
    lm = load_pretrained(base_model.PACKAGED)
    config = lora.LoraConfig(2, 4.0, ("q_proj",))
    factors = lora.init(jax.random.key(0), lm.config, config)
    adapter = lora.Adapter(factors, config, "org/elsewhere")
    folder = tmp_path_factory.mktemp("guard") / "g"
    made = guard.GuardFilter(lm.model, lm.params, adapter, tokenizer=lm.tokenizer, max_length=64)
    store.save(made, folder)
    path = folder / "filter.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model": "package:model"}))
    return folder, lm


def test_a_guard_reads_one_base_alone_and_says_which(guarded, caplog):
    folder, lm = guarded
    asked = []

    def load_model(name):
        asked.append(name)
        return lm

    with caplog.at_level("INFO", logger="absl"):  # a command in this process may have hushed it
        there = store.load(folder, load_model)
    guard.reload(guard.unload(there), load_model)
    assert asked == ["package:model"] * 2
    assert any("package:model" in m and str(folder) in m for m in caplog.messages)


@pytest.mark.parametrize("field", GUARDS)
def test_guards_that_claim_anything_are_one_line(guarded, tmp_path, field):
    folder = shutil.copytree(guarded[0], tmp_path / "g")
    about = json.loads((folder / "filter.json").read_text())
    for value in GUARDS[field]:
        (folder / "filter.json").write_text(json.dumps(about | {field: value}))
        with pytest.raises(REFUSED) as caught:
            store.load(folder, lambda name: guarded[1])
        assert len(one_line(caught.value)) < 700
