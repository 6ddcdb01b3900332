"""Low-rank adapters (Hu et al., 2021) as a pytree of their own.

An adapter mirrors the module path of the projections it changes:
`{"layers": {"self_attn": {"q_proj": {"a": [layers, in, rank], "b": [layers, rank, out]}}}}`.
"""

import math
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fedsafe_jax.models.decoder_config import PROJECTIONS, DecoderConfig, ModelError
from fedsafe_jax.models.hub import read_json, write_json

PEFT_PREFIX = "base_model.model.model.layers"
BLOCK_OF = {name: block for block, names in PROJECTIONS.items() for name in names}


class LoraConfig(NamedTuple):
    """Which projections are adapted, and how strongly.

    The scale is `alpha / rank`, or `alpha / sqrt(rank)` with rank stabilisation (rsLoRA,
    Kalajdzievski, 2023).
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    rank_stabilized: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


class Adapter(NamedTuple):
    """What an adapter folder holds.

    Attributes:
      factors: pytree of float32 arrays, as in the module's docstring.
      config: rank, alpha, targets.
      base_model: path or Hub id of the model it was trained on, "" when not known.
    """

    factors: dict
    config: LoraConfig
    base_model: str = ""


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


def update_of(adapter: Adapter) -> Callable:
    """What merging adds to the base, computed one kernel at a time.

    Args:
      adapter: factors and their scale.

    Returns:
      `(path of a kernel in the parameters, layer) -> scale * a @ b`, float32 `[in, out]`, or None
      where the adapter changes nothing.
    """

    factors, scale = adapter.factors, adapter.config.scale

    def update(path, layer):
        node = factors
        for key in path[:-1]:
            node = node.get(key, {})
        return scale * (node["a"][layer] @ node["b"][layer]) if "a" in node else None

    return update


def check_base(adapter: Adapter, config: DecoderConfig) -> None:
    """Checks that an adapter fits a base model.

    Raises:
      ModelError: other layers or sizes than the base has.
    """
    for block, projections in adapter.factors["layers"].items():
        for name, ab in projections.items():
            fan_in, fan_out = config.projection_shape(name)
            rank = ab["a"].shape[-1]
            wanted = (config.num_layers, fan_in, rank), (config.num_layers, rank, fan_out)
            found = ab["a"].shape, ab["b"].shape
            if found != wanted:
                raise ModelError(
                    f"the adapter belongs to another base{_named(adapter.base_model)}: its "
                    f"{block}.{name} has factors {found[0]} and {found[1]} (layers first), this "
                    f"model needs {wanted[0]} and {wanted[1]}."
                )


def _named(base_model: str) -> str:
    return f" ({base_model})" if base_model else ""


def save_adapter(adapter: Adapter, folder, base_model: str = "") -> None:
    """Writes PEFT's `adapter_config.json` and `adapter_model.safetensors`.

    Args:
      adapter: factors and their configuration.
      folder: created if missing.
      base_model: path or Hub id that PEFT records as the base; "" for the adapter's own.
    """
    folder, lora = pathlib.Path(folder), adapter.config
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for block, projections in adapter.factors["layers"].items():
        for name, ab in projections.items():
            for letter, stacked in (("A", ab["a"]), ("B", ab["b"])):
                for i, leaf in enumerate(np.asarray(jax.device_get(stacked))):
                    stem = f"{PEFT_PREFIX}.{i}.{block}.{name}"
                    tensors[f"{stem}.lora_{letter}.weight"] = np.ascontiguousarray(leaf.T)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model or adapter.base_model,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": sorted(lora.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": lora.rank_stabilized,
    }
    write_json(folder / "adapter_config.json", content)


# Fields of adapter_config.json that change the result, and the values that are supported.
PLAIN = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
}


def load_adapter(folder) -> Adapter:
    """Reads an adapter in PEFT's format.

    Raises:
      ModelError: files are missing, or the adapter is not a plain LoRA of the projections of all
        layers.
    """
    folder = pathlib.Path(folder)
    raw, weights = read_json(folder / "adapter_config.json"), folder / "adapter_model.safetensors"
    for field, supported in PLAIN.items():
        if raw.get(field) not in supported:
            raise ModelError(
                f"{folder / 'adapter_config.json'}: {field}={raw.get(field)!r} is not supported; "
                f"expected {supported[0]!r} (a plain LoRA)."
            )
    if not weights.is_file():
        raise ModelError(f"{weights}: no such file; pickled adapters (.bin) are not loaded.")
    pattern = re.compile(rf"{re.escape(PEFT_PREFIX)}\.(\d+)\.(\w+)\.(\w+)\.lora_([AB])\.weight")
    found: dict[tuple[str, str, str], dict[int, np.ndarray]] = {}
    try:
        tensors = load_file(weights)
    except SafetensorError as error:
        raise ModelError(f"{weights}: damaged or cut off ({error}).") from error
    for key, tensor in tensors.items():
        match = pattern.fullmatch(key)
        if not match or BLOCK_OF.get(match[3]) != match[2]:
            raise ModelError(f"{weights}: tensor '{key}' belongs to no known projection.")
        path = (match[2], match[3], match[4].lower())
        found.setdefault(path, {})[int(match[1])] = tensor.T
    factors: dict = {}
    for (block, name, letter), by_layer in sorted(found.items()):
        if sorted(by_layer) != list(range(len(by_layer))):
            raise ModelError(
                f"{weights}: {name} is adapted in layers {sorted(by_layer)} only; expected all."
            )
        stacked = np.stack([by_layer[i] for i in range(len(by_layer))]).astype(np.float32)
        node = factors.setdefault("layers", {}).setdefault(block, {}).setdefault(name, {})
        node[letter] = jnp.asarray(stacked)
    if not factors:
        raise ModelError(f"{weights}: holds no tensor.")
    names = tuple(name for name in BLOCK_OF if any(path[1] == name for path in found))
    config = LoraConfig(raw["r"], raw["lora_alpha"], names, bool(raw.get("use_rslora")))
    return Adapter(factors, config, raw.get("base_model_name_or_path") or "")
