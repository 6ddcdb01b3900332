"""Model folders that are not as they should be, and what loading costs."""

import collections
import fnmatch
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub.utils import filter_repo_objects
from safetensors.numpy import load_file, save_file
from tiny import tiny_config

from fedsafe_jax.federated.mesh import make_mesh
from fedsafe_jax.inference import pretrained
from fedsafe_jax.models import hub, quantize
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


def test_other_types_and_quantised_tensors_are_named(folder):
    key = "model.layers.1.mlp.up_proj.weight"
    change(folder, lambda tensors: tensors.update({key: tensors[key].astype("float8_e4m3fn")}))
    with pytest.raises(ModelError, match=rf"'{key}' has type F8_E4M3.* unquantised model"):
        load(folder)


def test_codes_of_quantised_weights_are_named(folder):
    def scaled(tensors):
        tensors["model.layers.1.mlp.up_proj.weight_scale"] = np.ones(1, np.float32)

    change(folder, scaled)
    with pytest.raises(ModelError, match=r"quantised.*up_proj.weight_scale.*unquantised model"):
        load(folder)


@pytest.mark.parametrize("files", [None, [], {"a": 3}, {"a": "../model.safetensors"}])
def test_an_index_that_is_none_is_one_line(folder, files):
    hub.write_json(folder / hub.INDEX, {"weight_map": files})
    with pytest.raises(ModelError, match=rf"{hub.INDEX}: "):
        load(folder)


def test_a_folder_with_gguf_says_to_name_the_file(tmp_path):
    (tmp_path / "model-q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"model-q4.gguf: name that file"):
        load(tmp_path)


def test_an_untied_model_without_a_head_is_named(folder):
    config = tiny_config(tie_embeddings=False)
    with pytest.raises(ModelError, match=r"'lm_head.weight' is missing.*tie_word_embeddings"):
        hub.load_params(folder, config, "float32")


@pytest.fixture
def tied(tmp_path, packaged):
    """The packaged model's folder, and its tensors."""
    pretrained.save_pretrained(packaged, tmp_path / "model")
    return tmp_path / "model", load_file(tmp_path / "model" / hub.SINGLE)


def test_an_equal_head_stays_tied(tied, packaged):
    folder, tensors = tied
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, folder / hub.SINGLE, metadata={"format": "pt"})
    lm = pretrained.load_pretrained(str(folder))
    assert lm.config == packaged.config and "lm_head" not in lm.params


def test_a_head_of_its_own_stays_one_through_export(tied, tmp_path, packaged):
    """One number differs, in the last row: transformers 5 then does not tie either."""
    folder, tensors = tied
    head = tensors["model.embed_tokens.weight"].copy()
    head[-1, -1] += 5.0
    save_file(tensors | {"lm_head.weight": head}, folder / hub.SINGLE, metadata={"format": "pt"})
    lm = pretrained.load_pretrained(str(folder))
    assert not lm.config.tie_embeddings
    tokens = np.array([[5, 6, 7, 8]])
    logits = np.asarray(lm(tokens))
    assert np.abs(logits - packaged(tokens)).max() > 0.01
    pretrained.save_pretrained(lm, tmp_path / "export")
    assert (
        json.loads((tmp_path / "export" / "config.json").read_text())["tie_word_embeddings"]
        is False
    )
    again = pretrained.load_pretrained(str(tmp_path / "export"))
    np.testing.assert_array_equal(again(tokens), logits)
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    for path in (folder, tmp_path / "export"):
        theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        with torch.no_grad():
            expected = theirs(torch.tensor(tokens)).logits.numpy()
        np.testing.assert_allclose(logits, expected, atol=1e-4)


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


WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}  # whole blocks of NF4


@pytest.fixture
def wide(tmp_path):
    """A folder of a model that NF4 can take, and its config."""
    config, blank = tiny_config(**WIDE), jnp.zeros((1, 4), jnp.int32)
    params = Decoder(config).init(jax.random.key(0), blank, blank, blank)["params"]
    hub.save_params(params, config, tmp_path, dtype="float32")
    return tmp_path, config


@pytest.mark.parametrize("model_parallel", [1, 2])
@pytest.mark.parametrize("kind", ["", "int8", "nf4"])
def test_each_part_is_read_once_for_all_copies(wide, monkeypatch, kind, model_parallel):
    folder, config = wide
    mesh, read = make_mesh(model_parallel=model_parallel), hub.Tensors.read
    monkeypatch.setattr(hub, "is_shared", lambda mesh: False)  # as on accelerators
    reads, numbers = collections.Counter(), collections.Counter()

    def counting(self, name, index):
        part = read(self, name, index)
        reads[name, str(index)] += 1
        numbers[name] += part.size
        return part

    monkeypatch.setattr(hub.Tensors, "read", counting)
    params = hub.load_params(folder, config, "float32", mesh, kind)
    assert len(params["norm"]["scale"].sharding.device_set) == 8
    assert set(reads.values()) == {1}
    sizes = {n: int(np.prod(x.tensor_shape)) for x in hub.leaves(config) for n in x.names}
    assert dict(numbers) == sizes  # parts of a tensor do not overlap
    split = [index for name, index in reads if name == "model.layers.1.mlp.up_proj.weight"]
    assert len(split) == model_parallel


@pytest.mark.parametrize("model_parallel", [0, 1, 2])
@pytest.mark.parametrize("kind", quantize.KINDS)
def test_kernels_quantised_layer_by_layer_are_those_of_the_whole(wide, kind, model_parallel):
    folder, config = wide
    mesh = make_mesh(model_parallel=model_parallel) if model_parallel else None
    whole = hub.load_params(folder, config, "float32", mesh)
    expected = quantize.quantize_params(whole, kind)
    loaded = hub.load_params(folder, config, "float32", mesh, kind)
    assert jax.tree.structure(loaded) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)
    codes = loaded["layers"]["mlp"]["down_proj"]["kernel"].codes
    assert codes.addressable_shards[0].data.shape[1] == codes.shape[1] // max(model_parallel, 1)


def test_quantising_a_layer_overwrites_its_place(wide):
    folder, config = wide
    placed = hub.load_params(folder, config, "float32", None, "nf4")
    codes = placed["layers"]["mlp"]["up_proj"]["kernel"]
    again = hub._with_layer(codes, jax.tree.map(lambda x: x[0], codes), 1)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(codes))
    np.testing.assert_array_equal(again.codes[1], again.codes[0])


REPOSITORY = (
    "config.json generation_config.json params.json model.safetensors.index.json "
    "model-00001-of-00002.safetensors model-00002-of-00002.safetensors "
    "consolidated.safetensors consolidated-00001-of-00002.safetensors "
    "consolidated.safetensors.index.json original/consolidated.00.pth original/params.json "
    "original/tokenizer.model onnx/model.onnx onnx/config.json fp16/model.safetensors "
    "model-q4.gguf pytorch_model.bin modeling_own.py tokenizer.json tokenizer_config.json "
    "tokenizer.model chat_template.jinja README.md"
).split()


def test_one_copy_of_the_weights_is_fetched(monkeypatch, tmp_path):
    asked = []

    def snapshot_download(name, **patterns):
        asked.append((name, patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert hub.resolve("org/model") == tmp_path
    ((name, patterns),) = asked
    assert name == "org/model"
    assert set(filter_repo_objects(REPOSITORY, **patterns)) == {
        "config.json", "generation_config.json", "params.json", "model.safetensors.index.json",
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "tokenizer.json",
        "tokenizer_config.json", "tokenizer.model", "chat_template.jinja",
    }  # fmt: skip


def test_what_a_load_reads_is_fetched(monkeypatch, packaged, tmp_path):
    whole, snapshot = tmp_path / "whole", tmp_path / "snapshot"
    pretrained.save_pretrained(packaged, whole, shard_bytes=2_000_000)
    for junk in ("consolidated.safetensors", "original/params.json", "onnx/model.safetensors"):
        (whole / junk).parent.mkdir(exist_ok=True)
        (whole / junk).write_bytes(b"not read")

    def snapshot_download(name, **patterns):
        del name
        files = [str(p.relative_to(whole)) for p in whole.rglob("*") if p.is_file()]
        for file in filter_repo_objects(files, **patterns):
            (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(whole / file, snapshot / file)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    fetched = pretrained.load_pretrained("org/model")
    for lm in (fetched, pretrained.load_pretrained(str(whole))):  # junk beside is not read
        jax.tree.map(np.testing.assert_array_equal, lm.params, packaged.params)
        assert lm.generate(["Hello!"]) == packaged.generate(["Hello!"])
    assert fetched.tokenizer.chat_template == packaged.tokenizer.chat_template
    shards = fnmatch.filter([p.name for p in snapshot.iterdir()], "*.safetensors")
    assert len(shards) > 1 and all(shard.startswith("model-") for shard in shards)
