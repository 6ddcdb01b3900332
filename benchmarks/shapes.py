"""Models of known shapes with random weights, for measuring speed."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp

import fedsafe_jax as fs
from fedsafe_jax.models import hub
from fedsafe_jax.models.decoder import param_shapes
from fedsafe_jax.models.decoder_config import DecoderConfig, from_hf


def _llama(vocabulary, hidden, intermediate, layers, heads, kv_heads, tied=True, **more) -> dict:
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": vocabulary,
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "max_position_embeddings": 8192, "tie_word_embeddings": tied, **more,
    }  # fmt: skip


# `demo` is the packaged model (4.2M parameters).
SHAPES = {
    "5m": _llama(8192, 256, 768, layers=4, heads=4, kv_heads=2),
    "7m": _llama(4096, 256, 768, layers=8, heads=4, kv_heads=2),
    "27m": _llama(4096, 512, 1536, layers=8, heads=8, kv_heads=4),
    "30m": _llama(8192, 512, 1536, layers=8, heads=8, kv_heads=4),
    "135m": _llama(49152, 576, 1536, layers=30, heads=9, kv_heads=3),  # SmolLM2-135M
    "1b": _llama(
        128256, 2048, 8192, layers=16, heads=32, kv_heads=8, rope_theta=500000.0
    ),  # Llama-3.2-1B
    "8b": _llama(
        128256, 4096, 14336, layers=32, heads=32, kv_heads=8, tied=False, rope_theta=500000.0
    ),  # Llama-3.1-8B
}
NAMES = ("demo", *SHAPES)
LARGE = ("1b", "8b")  # bfloat16, and without a folder for a peer


def config_of(shape: str, dtype: str = "") -> DecoderConfig:
    """Of a key of `SHAPES`; large ones are bfloat16 unless told."""
    dtype = dtype or ("bfloat16" if shape in LARGE else "float32")
    return from_hf(hub.hf_config(SHAPES[shape]), dtype)


def random_model(shape: str, tokenizer, dtype: str = "float32", mesh=None) -> fs.LanguageModel:
    """A model with random weights.

    Args:
      shape: a key of `SHAPES`.
      tokenizer: of a vocabulary no larger than the shape's.
      dtype: of the weights.
      mesh: devices; None for the first.
    """
    config = dataclasses.replace(config_of(shape, dtype), mesh=mesh)
    places, tree = jax.tree.flatten(param_shapes(config))

    @functools.partial(jax.jit, static_argnums=1)
    def draw(key, shape):  # a leaf at a time: all of 8B in float32 do not fit beside each other
        if len(shape) < 2 or shape == (config.num_layers, config.hidden_size):
            return jnp.ones(shape, dtype)  # scale of a norm
        return jax.random.normal(key, shape, dtype) * jnp.asarray(shape[-2] ** -0.5, dtype)

    keys = jax.random.split(jax.random.key(0), len(places))
    leaves = [draw(key, place.shape) for key, place in zip(keys, places, strict=True)]
    params = jax.tree.unflatten(tree, leaves)
    return fs.LanguageModel(config, params, tokenizer, hf_config=SHAPES[shape])


def changed(lm: fs.LanguageModel, **fields) -> fs.LanguageModel:
    """The same model under a config with other fields."""
    return dataclasses.replace(lm, config=dataclasses.replace(lm.config, **fields))


def write_config(shape: str, tokenizer, folder: pathlib.Path) -> None:
    """Writes `config.json` and the tokenizer, for a peer that draws its own weights."""
    tokenizer.save_pretrained(folder)
    hub.write_json(folder / "config.json", SHAPES[shape])


def model(shape: str, folder: pathlib.Path, mesh=None) -> fs.LanguageModel:
    """The model of a shape; unless it is large, also as a folder for the peer."""
    packaged = fs.load_pretrained("package:model", mesh=mesh)
    if shape in LARGE:
        return random_model(shape, packaged.tokenizer, "bfloat16")
    if shape == "demo":
        fs.save_pretrained(packaged, folder, "float32")
        return packaged
    fs.save_pretrained(random_model(shape, packaged.tokenizer), folder)
    return fs.load_pretrained(str(folder), mesh=mesh)
