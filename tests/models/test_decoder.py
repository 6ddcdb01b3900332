"""The decoder against transformers, packed against apart, cached against full."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config

from fedsafe_jax.models import hub
from fedsafe_jax.models.decoder import Decoder, empty_cache

# float32 on CPU: two orders of summation over a few hundred terms differ by about 1e-6.
TOLERANCE = 1e-4


def init(config, seed=0):
    blank = jnp.zeros((1, 4), jnp.int32)
    return Decoder(config).init(jax.random.key(seed), blank, blank, blank)["params"]


class FakeTokenizer:
    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scaling", [None, (8.0, 1.0, 4.0, 16.0)])
def test_logits_equal_transformers_both_ways(tmp_path, tied, scaling):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    config = tiny_config(tie_embeddings=tied, rope_scaling=scaling)
    params = init(config)
    hub.save_params(params, config, tmp_path, "float32")
    hub.write_json(tmp_path / "config.json", hub.config_dict(config, FakeTokenizer, "float32"))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = np.random.default_rng(0).integers(0, 97, (2, 40))
    expected = reference(torch.tensor(tokens)).logits.detach().numpy()
    positions = np.broadcast_to(np.arange(40), tokens.shape)
    ours = Decoder(config).apply(
        {"params": params}, tokens, positions, np.ones_like(tokens), method="logits"
    )
    np.testing.assert_allclose(ours, expected, atol=TOLERANCE)

    reference.save_pretrained(tmp_path / "again")
    read = hub.read_config(tmp_path / "again")
    assert read == config
    loaded = hub.load_params(tmp_path / "again", read, "float32")
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_packed_rows_equal_sequences_apart():
    config = tiny_config()
    params = init(config)
    rng = np.random.default_rng(1)
    first, second = rng.integers(0, 97, 9), rng.integers(0, 97, 6)
    model = Decoder(config)

    def alone(tokens):
        ones = np.ones((1, len(tokens)), np.int32)
        positions = np.arange(len(tokens))[None]
        return model.apply({"params": params}, tokens[None], positions, ones, method="logits")[0]

    tokens = np.concatenate([first, second, [0]])[None]
    segments = np.array([[1] * 9 + [2] * 6 + [0]])
    positions = np.concatenate([np.arange(9), np.arange(6), [0]])[None]
    packed = model.apply({"params": params}, tokens, positions, segments, method="logits")[0]
    np.testing.assert_allclose(packed[:9], alone(first), atol=TOLERANCE)
    np.testing.assert_allclose(packed[9:15], alone(second), atol=TOLERANCE)


def test_cached_steps_equal_one_forward_pass():
    config = tiny_config()
    params, model = init(config), Decoder(config)
    tokens = np.random.default_rng(2).integers(0, 97, (2, 12))
    positions = np.broadcast_to(np.arange(12), tokens.shape)
    full, _ = model.apply({"params": params}, tokens, positions, np.ones_like(tokens))
    cache = empty_cache(config, 2, 12)
    parts = []
    for start, end in ((0, 7), (7, 8), (8, 12)):
        valid = np.ones((2, end - start), bool)
        hidden, cache = model.apply(
            {"params": params}, tokens[:, start:end], positions[:, start:end], None, cache, valid
        )
        parts.append(hidden)
    np.testing.assert_allclose(np.concatenate(parts, 1), full, atol=TOLERANCE)


def test_parameter_count_is_that_of_the_arrays():
    for tied in (True, False):
        config = tiny_config(tie_embeddings=tied)
        assert config.num_parameters() == sum(x.size for x in jax.tree.leaves(init(config)))


def test_unsupported_models_are_named(tmp_path):
    with pytest.raises(hub.ModelError, match="config.json"):
        hub.read_config(tmp_path)
    raw = hub.config_dict(tiny_config(), FakeTokenizer, "float32")
    raw["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 1e4}
    hub.write_json(tmp_path / "config.json", raw)
    with pytest.raises(hub.ModelError, match="yarn"):
        hub.read_config(tmp_path)
    raw["architectures"] = ["GPT2LMHeadModel"]
    hub.write_json(tmp_path / "config.json", raw)
    with pytest.raises(hub.ModelError, match="GPT2LMHeadModel"):
        hub.read_config(tmp_path)
    with pytest.raises(hub.ModelError, match="no such folder"):
        hub.resolve("/no/such/folder")
