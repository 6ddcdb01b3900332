"""The decoder against transformers, packed against apart, cached against full, split over devices.

Tolerance: float32 on CPU. Two orders of summation over a few hundred terms differ by about 1e-6 of
logits of size 1, and a few layers make that 1e-5; 1e-4 is the bound that the project promises.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import FAMILIES, VOCAB, checkpoint
from tiny import tiny_config

from fedsafe_jax.federated.mesh import make_mesh
from fedsafe_jax.models import hub
from fedsafe_jax.models.cache import empty_cache, grow_cache, spread_cache, unstack
from fedsafe_jax.models.decoder import Decoder, num_parameters, param_shapes
from fedsafe_jax.models.decoder_config import ModelError

TOLERANCE = 1e-4


def init(config, seed=0):
    blank = jnp.zeros((1, 4), jnp.int32)
    return Decoder(config).init(jax.random.key(seed), blank, blank, blank)["params"]


@functools.partial(jax.jit, static_argnums=0)
def logits(config, params, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    ones = jnp.ones_like(tokens)
    return Decoder(config).apply({"params": params}, tokens, positions, ones, method="logits")


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers_both_ways(tmp_path, family):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    from fedsafe_jax.inference.language_model import LanguageModel
    from fedsafe_jax.inference.pretrained import save_pretrained

    reference = checkpoint(family, tmp_path)
    # Longer than the windows of the families that have one.
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 40))
    with torch.no_grad():
        expected = reference(torch.tensor(tokens)).logits.numpy()
    config = hub.read_config(tmp_path)
    params = hub.load_params(tmp_path, config, "float32")
    np.testing.assert_allclose(logits(config, params, tokens), expected, atol=TOLERANCE)
    assert num_parameters(config) == reference.num_parameters()

    lm = LanguageModel(
        config, params, FakeTokenizer(), hf_config=hub.read_json(tmp_path / "config.json")
    )
    save_pretrained(lm, tmp_path / "again", shard_bytes=40_000)  # several shards
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        np.testing.assert_array_equal(again(torch.tensor(tokens)).logits.numpy(), expected)


class FakeTokenizer:
    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

    def save_pretrained(self, folder):
        pass


@functools.partial(jax.jit, static_argnums=0)
def extend(model, params, *inputs):
    hidden, cache = model.apply({"params": params}, *inputs)
    return model.apply({"params": params}, hidden, method="unembed"), cache


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_padded_and_cached_equal_sequences_apart(tmp_path, family):
    pytest.importorskip("torch")
    checkpoint(family, tmp_path)
    config = hub.read_config(tmp_path)
    params, model = hub.load_params(tmp_path, config, "float32"), Decoder(config)
    rng = np.random.default_rng(1)
    sequences = [rng.integers(0, VOCAB, n) for n in (19, 6)]
    alone = [logits(config, params, s[None])[0] for s in sequences]

    tokens = np.concatenate([*sequences, [0]])[None]
    segments = np.array([[1] * 19 + [2] * 6 + [0]])
    positions = np.concatenate([np.arange(19), np.arange(6), [0]])[None]
    packed = model.apply({"params": params}, tokens, positions, segments, method="logits")[0]
    np.testing.assert_allclose(packed[:19], alone[0], atol=TOLERANCE)
    np.testing.assert_allclose(packed[19:25], alone[1], atol=TOLERANCE)

    right = np.zeros((2, 24), np.int32)
    left, valid = right.copy(), np.zeros((2, 24), bool)
    for i, s in enumerate(sequences):
        right[i, : len(s)] = s
        left[i, 24 - len(s) :] = s
        valid[i, 24 - len(s) :] = True
    segments = valid[:, ::-1].astype(np.int32)
    positions = np.broadcast_to(np.arange(24), right.shape)
    padded = model.apply({"params": params}, right, positions, segments, method="logits")
    # In three parts through the cache, as generation reads prompts and then tokens.
    cache, parts = empty_cache(config, 2, 24), []
    positions = np.maximum(np.cumsum(valid, 1) - 1, 0)
    for part in (slice(0, 20), slice(20, 21), slice(21, 24)):
        inputs = (left[:, part], positions[:, part], None, cache, valid[:, part])
        new, cache = extend(model, params, *inputs)
        parts.append(new)
    cached = np.concatenate(parts, 1)
    for i, s in enumerate(sequences):
        np.testing.assert_allclose(padded[i, : len(s)], alone[i], atol=TOLERANCE)
        np.testing.assert_allclose(cached[i, 24 - len(s) :], alone[i], atol=TOLERANCE)


def test_unrolled_layers_go_on_from_packed_rows():
    config = tiny_config(windowed_layers=(0,), window=4)
    params, model = init(config), Decoder(config)
    tokens = np.random.default_rng(3).integers(0, 97, (1, 12))
    positions, segments = np.arange(11)[None], np.ones((1, 11), np.int32)
    cache = empty_cache(config, 1, 11)
    _, cache = model.apply(
        {"params": params}, tokens[:, :11], positions, segments, cache, segments > 0
    )
    # Two rows: all eleven tokens, and the last five left-padded (of no meaning, but in shape).
    source = np.stack([np.arange(11), np.maximum(np.arange(11), 6)])
    valid, length = source >= np.array([[0], [6]]), jnp.asarray(11, jnp.int32)
    cache = spread_cache(config, cache, source, valid, length)
    cache = grow_cache(cache, 16)
    assert isinstance(cache.key, tuple) and cache.key[0].shape == (2, 2, 8, 16)
    separate = {"params": unstack(params, 2)}
    new = (np.repeat(tokens[:, 11:], 2, 0), np.full((2, 1), 11), None, cache, np.ones((2, 1), bool))
    hidden, _ = model.apply(separate, *new)
    last = model.apply(separate, hidden, method="unembed")[0, 0]
    np.testing.assert_allclose(last, logits(config, params, tokens)[0, -1], atol=TOLERANCE)


@pytest.mark.parametrize("quantization", ["", "int8"])
def test_same_logits_on_a_mesh_of_clients_and_model(tmp_path, quantization):
    config = tiny_config(tie_embeddings=False, num_kv_heads=4)
    hub.save_params(init(config), config, tmp_path, dtype="float32")
    tokens = np.random.default_rng(4).integers(0, 97, (4, 12))
    params = hub.load_params(tmp_path, config, "float32", quantization=quantization)
    expected = logits(config, params, tokens)
    mesh = make_mesh(model_parallel=4)
    assert dict(mesh.shape) == {"clients": 2, "model": 4}
    split = hub.load_params(tmp_path, config, "float32", mesh, quantization)
    kernel = jax.tree.leaves(split["layers"]["self_attn"]["q_proj"]["kernel"])[0]
    assert kernel.sharding.shard_shape(kernel.shape)[-1] == kernel.shape[-1] // 4
    np.testing.assert_allclose(logits(config, split, tokens), expected, atol=TOLERANCE)


def test_parameter_count_is_that_of_the_arrays():
    for tied in (True, False):
        config = tiny_config(tie_embeddings=tied)
        params = init(config)
        assert num_parameters(config) == sum(x.size for x in jax.tree.leaves(params))
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, param_shapes(config))


def test_unsupported_configs_are_named(tmp_path):
    with pytest.raises(ModelError, match=r"config.json: no such file"):
        hub.read_config(tmp_path)
    raw = {"model_type": "llama", "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}
    for change, message in (
        ({}, "rope scaling 'yarn' is not supported; expected default, linear or llama3"),
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported are gemma2, "),
        ({"rope_scaling": None, "hidden_act": "relu"}, "activation 'relu'"),
    ):
        hub.write_json(tmp_path / "config.json", raw | change)
        with pytest.raises(ModelError, match=message):
            hub.read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not JSON"):
        hub.read_config(tmp_path)
    with pytest.raises(ModelError, match="no such folder"):
        hub.resolve("/no/such/folder")
