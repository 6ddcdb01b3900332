"""Low-rank adapters (Hu et al., 2021) as a pytree of their own.

An adapter mirrors the module path of the projections it changes:
`{"layers": {"self_attn": {"q_proj": {"a": [layers, in, rank], "b": [layers, rank, out]}}}}`.
"""

import json
import math
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.flax import save_file

from fedsafe_jax.models.decoder import PROJECTIONS, DecoderConfig
from fedsafe_jax.models.hub import ModelError, write_json

BLOCK_OF = {name: block for block, names in PROJECTIONS.items() for name in names}


class LoraConfig(NamedTuple):
    """Which projections are adapted, and how strongly; the scale is `alpha / rank`."""

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def expand_targets(targets: Sequence[str] | str) -> tuple[str, ...]:
    """Projection names; "all-linear" means all seven.

    Raises:
      ModelError: an unknown projection.
    """
    if targets == "all-linear" or tuple(targets) == ("all-linear",):
        return tuple(BLOCK_OF)
    unknown = sorted(set(targets) - set(BLOCK_OF))
    if unknown or not targets:
        raise ModelError(
            f"lora_targets: {unknown or targets}; expected 'all-linear' or some of "
            f"{', '.join(sorted(BLOCK_OF))}."
        )
    return tuple(targets)


def init(key: jax.Array, config: DecoderConfig, lora: LoraConfig):
    """A fresh adapter: `a` uniform in +-1/sqrt(in) as PEFT draws it, `b` zero, so no change yet."""
    adapter: dict = {}
    for i, name in enumerate(lora.targets):
        fan_in, fan_out = config.projection_shape(name)
        bound = 1 / math.sqrt(fan_in)
        shape = (config.num_layers, fan_in, lora.rank)
        factors = {
            "a": jax.random.uniform(jax.random.fold_in(key, i), shape, jnp.float32, -bound, bound),
            "b": jnp.zeros((config.num_layers, lora.rank, fan_out), jnp.float32),
        }
        adapter.setdefault("layers", {}).setdefault(BLOCK_OF[name], {})[name] = factors
    return adapter


def merge(params, adapter, scale: float):
    """Base parameters with `scale * a @ b` added to each adapted kernel, in the base's dtype."""
    merged = jax.tree.map(lambda x: x, params)  # new dicts, shared leaves
    for block, projections in adapter["layers"].items():
        for name, factors in projections.items():
            kernel = merged["layers"][block][name]["kernel"]
            delta = scale * jnp.einsum("lir,lro->lio", factors["a"], factors["b"])
            new = (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)
            merged["layers"][block][name] = {"kernel": new}
    return merged


def save_adapter(adapter, lora: LoraConfig, folder, base_model: str) -> None:
    """Writes PEFT's `adapter_config.json` and `adapter_model.safetensors`.

    Args:
      adapter: pytree of factors.
      lora: rank, alpha and targets.
      folder: created if missing.
      base_model: path or Hub id that PEFT records as the base.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for block, projections in adapter["layers"].items():
        for name, factors in projections.items():
            for i in range(factors["a"].shape[0]):
                prefix = f"base_model.model.model.layers.{i}.{block}.{name}"
                for letter, leaf in (("A", factors["a"]), ("B", factors["b"])):
                    tensor = np.ascontiguousarray(jax.device_get(leaf[i]).T)
                    tensors[f"{prefix}.lora_{letter}.weight"] = jnp.asarray(tensor)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": sorted(lora.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": False,
    }
    write_json(folder / "adapter_config.json", content)


def load_adapter(folder) -> tuple[dict, LoraConfig]:
    """Reads an adapter in PEFT's format.

    Raises:
      ModelError: files are missing, or the adapter is not a plain LoRA of known projections.
    """
    folder = pathlib.Path(folder)
    config_path, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for path in (config_path, weights):
        if not path.is_file():
            raise ModelError(f"{path}: no such file; a PEFT adapter folder holds it.")
    raw = json.loads(config_path.read_text())
    if raw.get("peft_type") != "LORA" or raw.get("use_dora") or raw.get("bias", "none") != "none":
        raise ModelError(f"{config_path}: expected a plain LoRA without DoRA and bias.")
    alpha = raw["lora_alpha"] * (math.sqrt(raw["r"]) if raw.get("use_rslora") else 1)
    layers: dict[tuple, dict[int, jax.Array]] = {}
    with safe_open(weights, framework="flax") as file:
        for key in file.keys():
            parts = key.split(".")
            if len(parts) != 9 or parts[6] not in BLOCK_OF:
                raise ModelError(f"{weights}: tensor '{key}' belongs to no known projection.")
            path = (parts[5], parts[6], "a" if parts[7] == "lora_A" else "b")
            layers.setdefault(path, {})[int(parts[4])] = file.get_tensor(key).T
    adapter: dict = {}
    for (block, name, letter), leaf in layers.items():
        stacked = jnp.stack([leaf[i] for i in sorted(leaf)]).astype(jnp.float32)
        adapter.setdefault("layers", {}).setdefault(block, {}).setdefault(name, {})[letter] = (
            stacked
        )
    names = tuple(name for name in BLOCK_OF if any(path[1] == name for path in layers))
    return adapter, LoraConfig(raw["r"], alpha, names)
