"""Hugging Face folders to pytrees and back, tensor by tensor."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.flax import save_file

from fedsafe_jax.models.decoder import PROJECTIONS, DecoderConfig

NORMS = ("input_layernorm", "post_attention_layernorm")
ARCHITECTURE = "LlamaForCausalLM"


class ModelError(ValueError):
    """A model folder cannot be used; the message says what was found and what is supported."""


def resolve(path_or_hub_id: str) -> pathlib.Path:
    """A local folder as it is, or the downloaded snapshot of a Hub model.

    Raises:
      ModelError: neither a folder nor a model that the Hub serves.
    """
    path = pathlib.Path(path_or_hub_id)
    if path.is_dir():
        return path
    if path.is_absolute() or path_or_hub_id.count("/") != 1:
        raise ModelError(
            f"model '{path_or_hub_id}': no such folder, and not a Hub id (owner/name)."
        )
    from huggingface_hub import snapshot_download

    try:
        # Safetensors only: no pickled weights, no remote code.
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
        return pathlib.Path(snapshot_download(path_or_hub_id, allow_patterns=patterns))
    except Exception as error:
        raise ModelError(
            f"model '{path_or_hub_id}' could not be loaded from the Hub: {error}"
        ) from error


def read_config(folder: pathlib.Path, dtype: str = "float32") -> DecoderConfig:
    """Reads `config.json` in the spelling of transformers 4 or 5.

    Raises:
      ModelError: no config, another architecture, or an unknown kind of rope scaling.
    """
    path = pathlib.Path(folder) / "config.json"
    if not path.is_file():
        raise ModelError(f"{path}: no such file; a Hugging Face model folder holds a config.json.")
    raw = json.loads(path.read_text())
    found = (raw.get("architectures") or ["none named"])[0]
    if found != ARCHITECTURE or raw.get("attention_bias") or raw.get("mlp_bias"):
        raise ModelError(
            f"{path}: architecture {found} is not supported; expected a {ARCHITECTURE} "
            "without biases."
        )
    rope = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or rope
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        parameters = None
    elif kind == "llama3":
        names = (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        )
        parameters = tuple(float(scaling[name]) for name in names)
    else:
        raise ModelError(
            f"{path}: rope scaling '{kind}' is not supported; expected default or llama3."
        )
    return DecoderConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=raw["num_attention_heads"],
        num_kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
        head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
        rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0),
        rope_scaling=parameters,
        rms_norm_eps=raw["rms_norm_eps"],
        tie_embeddings=raw.get("tie_word_embeddings", False),
        max_length=raw["max_position_embeddings"],
        dtype=dtype,
    )


def config_dict(config: DecoderConfig, tokenizer, dtype: str) -> dict:
    """The `config.json` that transformers reads."""
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        names = (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        )
        rope |= {"rope_type": "llama3"} | dict(zip(names, config.rope_scaling, strict=True))
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rope_parameters": rope,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_length,
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": dtype,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def tensor_names(config: DecoderConfig) -> dict[tuple[str, ...], str]:
    """From a leaf's path in our pytree to its Hugging Face name; `{}` stands for the layer."""
    names = {("embed_tokens",): "model.embed_tokens.weight", ("norm", "scale"): "model.norm.weight"}
    if not config.tie_embeddings:
        names[("lm_head",)] = "lm_head.weight"
    for norm in NORMS:
        names[("layers", norm, "scale")] = f"model.layers.{{}}.{norm}.weight"
    for block, projections in PROJECTIONS.items():
        for projection in projections:
            names[("layers", block, projection, "kernel")] = (
                f"model.layers.{{}}.{block}.{projection}.weight"
            )
    return names


def _transposed(path: tuple[str, ...]) -> bool:
    return path[-1] in ("kernel", "lm_head")  # torch linears are [out, in]


def load_params(folder: pathlib.Path, config: DecoderConfig, dtype: str):
    """Base parameters from single or sharded safetensors, one stacked leaf at a time.

    Raises:
      ModelError: no safetensors (pickled weights are not loaded), or a tensor is missing.
    """
    folder = pathlib.Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        where = json.loads(index.read_text())["weight_map"]
    elif (folder / "model.safetensors").is_file():
        with safe_open(folder / "model.safetensors", framework="flax") as file:
            where = dict.fromkeys(file.keys(), "model.safetensors")
    else:
        raise ModelError(f"{folder}: no model.safetensors; pickled weights are not loaded.")
    files = {
        name: safe_open(folder / name, framework="flax") for name in sorted(set(where.values()))
    }

    def read(name, transpose):
        if name not in where:
            raise ModelError(f"{folder}: tensor '{name}' is missing.")
        tensor = files[where[name]].get_tensor(name).astype(dtype)
        return tensor.T if transpose else tensor

    params: dict = {}
    for path, name in tensor_names(config).items():
        if "{}" in name:
            layers = range(config.num_layers)
            leaf = jnp.stack([read(name.format(i), _transposed(path)) for i in layers])
        else:
            leaf = read(name, _transposed(path))
        node = params
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return params


def save_params(params, config: DecoderConfig, folder: pathlib.Path, dtype: str) -> None:
    """Writes `model.safetensors` under Hugging Face names."""
    tensors = {}
    for path, name in tensor_names(config).items():
        leaf = params
        for key in path:
            leaf = leaf[key]
        leaf = jnp.asarray(leaf, dtype)
        if "{}" in name:
            for i in range(config.num_layers):
                tensors[name.format(i)] = leaf[i].T if _transposed(path) else leaf[i]
        else:
            tensors[name] = leaf.T if _transposed(path) else leaf
    tensors = {
        name: jnp.asarray(np.ascontiguousarray(jax.device_get(t))) for name, t in tensors.items()
    }
    save_file(tensors, pathlib.Path(folder) / "model.safetensors", metadata={"format": "pt"})


def write_json(path: pathlib.Path, content: dict) -> None:
    """Indented JSON with a final newline."""
    pathlib.Path(path).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
