"""Model folders for the cases: a random Llama of 32 hidden units, and the packaged model with
another chat template."""

import json
import pathlib
import shutil

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

import fedsafe_jax

PACKAGED = pathlib.Path(fedsafe_jax.__file__).parent / "assets" / "model"
LAYERS, HIDDEN, INNER, KEYS = 2, 32, 48, 16
PROJECTIONS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


def make(folder: pathlib.Path, own_head: bool = False, quantised: str = "") -> str:
    """Writes a model folder with the packaged tokenizer.

    Args:
      folder: created.
      own_head: adds an `lm_head.weight`, although the config ties it to the embedding.
      quantised: "fp8_scaled", "fp8_bare" (without scales) or "gptq"; "" for float32.

    Returns:
      The folder, as `load_pretrained` takes it.
    """
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(PACKAGED / name, folder / name)
    config = json.loads((PACKAGED / "config.json").read_text()) | {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "head_dim": 8,
        "dtype": "float32",
    }
    tensors = _tensors(config["vocab_size"], own_head)
    if quantised:
        config["quantization_config"] = _quantise(tensors, quantised)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def _tensors(vocab_size: int, own_head: bool) -> dict:
    rng = np.random.default_rng(0)

    def draw(*shape):
        return (rng.standard_normal(shape) * 0.2).astype(np.float32)

    ones = np.ones(HIDDEN, np.float32)
    tensors = {"model.embed_tokens.weight": draw(vocab_size, HIDDEN), "model.norm.weight": ones}
    for layer in range(LAYERS):
        stem = f"model.layers.{layer}"
        for name, shape in PROJECTIONS.items():
            tensors[f"{stem}.{name}.weight"] = draw(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{stem}.{name}.weight"] = ones
    if own_head:
        tensors["lm_head.weight"] = draw(vocab_size, HIDDEN)
    return tensors


def _quantise(tensors: dict, kind: str) -> dict:
    """Replaces the projections; returns the `quantization_config` that goes with them."""
    for name in [name for name in tensors if "_proj" in name]:
        weight = tensors.pop(name)
        if kind == "gptq":
            tensors[name.replace("weight", "qweight")] = np.zeros((4, 4), np.int32)
            continue
        scale = np.abs(weight).max() / 448
        tensors[name] = (weight / scale).astype(ml_dtypes.float8_e4m3fn)
        if kind == "fp8_scaled":
            tensors[name.replace("weight", "weight_scale")] = np.array([scale], np.float32)
    if kind == "gptq":
        return {"quant_method": "gptq", "bits": 4}
    return {"quant_method": "compressed-tensors", "format": "float-quantized"}


def with_template(folder: pathlib.Path, template: str) -> str:
    """Writes the packaged model with another chat template; returns the folder."""
    shutil.copytree(PACKAGED, folder)
    (folder / "chat_template.jinja").write_text(template)
    return str(folder)
