"""Model folders that are not as they should be, and what loading costs."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import tiny_config

from fedsafe_jax.models import hub
from fedsafe_jax.models.decoder import Decoder
from fedsafe_jax.models.decoder_config import ModelError


@pytest.fixture
def folder(tmp_path):
    """Weights of the tiny config, sharded."""
    config, blank = tiny_config(), jnp.zeros((1, 4), jnp.int32)
    params = Decoder(config).init(jax.random.key(0), blank, blank, blank)["params"]
    hub.save_params(params, config, tmp_path, dtype="float32", shard_bytes=20_000)
    return tmp_path


def load(folder):
    return hub.load_params(folder, tiny_config(), "float32")


def change(folder, edit):
    """Rewrites the folder as one file, after `edit` of its tensors."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (folder / hub.INDEX).unlink()
    edit(tensors)
    save_file(tensors, folder / hub.SINGLE)


def test_sharded_folders_load_to_the_bit(folder):
    shards = load(folder)
    change(folder, lambda tensors: None)
    jax.tree.map(np.testing.assert_array_equal, load(folder), shards)


def test_tensors_that_do_not_belong_are_named(folder):
    def swap(tensors):
        tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)

    change(folder, swap)
    with pytest.raises(ModelError, match=r"1 tensors are not of this model: model.layers.2.mlp.up"):
        load(folder)


def test_a_missing_tensor_is_named(folder):
    change(folder, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ModelError, match="1 tensors are missing: model.norm.weight"):
        load(folder)


def test_a_wrong_shape_is_named(folder):
    def cut(tensors):
        tensors["model.norm.weight"] = np.zeros(31, np.float32)

    change(folder, cut)
    with pytest.raises(ModelError, match=r"'model.norm.weight' has shape \[31\].* asks for \[32\]"):
        load(folder)


def test_damaged_and_missing_files_are_named(folder):
    files = sorted(folder.glob("*.safetensors"))
    files[1].write_bytes(files[1].read_bytes()[:-100])
    with pytest.raises(ModelError, match=rf"{files[1].name}: damaged or cut off"):
        load(folder)
    files[1].unlink()
    with pytest.raises(ModelError, match=rf"{files[1].name}: no such file, though .* names it"):
        load(folder)


def test_an_index_that_names_the_wrong_file_is_refused(folder):
    index = json.loads((folder / hub.INDEX).read_text())
    names = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.norm.weight"] = names[0]
    hub.write_json(folder / hub.INDEX, index)
    with pytest.raises(ModelError, match=rf"'model.norm.weight' is not in {names[0]}"):
        load(folder)


def test_pickled_weights_are_refused_with_a_way_out(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="pickled weights are not loaded.*save_pretrained"):
        load(tmp_path)


PEAK = """
import resource, sys
import jax
from fedsafe_jax.models import hub
from fedsafe_jax.models.decoder_config import DecoderConfig
config = DecoderConfig(**{fields!r})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
params = jax.block_until_ready(hub.load_params({folder!r}, config, "float32"))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_model_is_never_twice_in_memory(tmp_path):
    fields = {
        "vocab_size": 100, "hidden_size": 1024, "intermediate_size": 2048, "num_layers": 8,
        "num_heads": 8, "num_kv_heads": 8, "head_dim": 128,
    }  # fmt: skip
    config = tiny_config(**fields)
    shapes = hub.param_shapes(config)
    params = jax.tree.map(lambda s: jnp.ones(s.shape, "bfloat16"), shapes)
    hub.save_params(params, config, tmp_path, dtype="bfloat16")
    total = 4 * sum(s.size for s in jax.tree.leaves(shapes))  # bytes in float32
    stacked = 4 * max(s.size for s in jax.tree.leaves(shapes))
    code = PEAK.format(fields=fields, folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown = int(done.stdout) * 1024
    # The file's own pages count too, once (half of `total`); then one stacked leaf and its copy.
    assert grown < 1.5 * total + 3 * stacked < 2.5 * total
