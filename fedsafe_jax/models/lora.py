"""Low-rank adapters (LoRA, arXiv 2106.09685) as a pytree of factors, and PEFT's folders.

Factors mirror the module path of the projections that they change:
`{"layers": {"self_attn": {"q_proj": {"a": [layers, in, rank], "b": [layers, rank, out]}}}}`.
An `Adapter` is factors with their configuration and the name of their base model.
"""

import math
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from fedsafe_jax.models import base_model as base_names
from fedsafe_jax.models import peft_config
from fedsafe_jax.models.decoder_config import PROJECTIONS, DecoderConfig, ModelError
from fedsafe_jax.models.model_files import FLOATS, check_finite, write_json
from fedsafe_jax.models.tensor_files import save_file

PEFT_PREFIX = "base_model.model.model.layers"
BLOCK_OF = {name: block for block, names in PROJECTIONS.items() for name in names}

MOST_FACTOR = 1_000_000  # largest number in a factor; those of adapters in use are below 100
LAYERS_HINT = " An adapter of some layers alone (layers_to_transform of PEFT) is not supported."


class LoraConfig(NamedTuple):
    """Configuration of LoRA: rank, strength, and the projections that are adapted.

    The product `a @ b` is scaled by `alpha / rank`, or by `alpha / sqrt(rank)` with rank
    stabilisation (rsLoRA, arXiv 2312.03732).

    Attributes:
      rank: rank of the factors.
      alpha: numerator of the scale.
      targets: names of the adapted projections, see `expand_targets`.
      rank_stabilized: whether the scale is rsLoRA's.
      dropout: rate of dropout on the inputs of `a`, while it is trained on clients.

    >>> import fedsafe_jax as fs
    >>> fs.LoraConfig(rank=16, alpha=32.0, targets=("q_proj", "v_proj")).scale
    2.0
    >>> fs.LoraConfig(16, 32.0, ("q_proj", "v_proj"), rank_stabilized=True).scale
    8.0
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    rank_stabilized: bool = False
    dropout: float = 0.0

    @property
    def scale(self) -> float:
        """Factor of `a @ b`."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


def config_of(factors: dict, trained: LoraConfig) -> LoraConfig:
    """Returns the configuration of factors that have the scale of another rank.

    Args:
      factors: LoRA factors, such as trained ones with those of a residue behind them.
      trained: configuration of the trained ones, whose scale all of them have.

    Returns:
      The configuration with the rank of the factors, and with alpha so that the scale stays.
    """
    rank = jax.tree.leaves(factors)[0].shape[-1]
    if rank == trained.rank:
        return trained
    ratio = rank / trained.rank
    alpha = trained.alpha * (math.sqrt(ratio) if trained.rank_stabilized else ratio)
    return trained._replace(rank=rank, alpha=alpha)


class Adapter(NamedTuple):
    """Trained LoRA factors with all that is needed to apply them: what an adapter folder holds.

    Attributes:
      factors: pytree of float32 arrays; for each adapted projection `a` `[layers, in, rank]` and
        `b` `[layers, rank, out]`.
      config: rank, alpha and targets.
      base_model: path or Hub id of the model that it was trained on, "" when not known.

    >>> import jax.numpy as jnp
    >>> import fedsafe_jax as fs
    >>> a, b = jnp.ones((2, 8, 4)), jnp.zeros((2, 4, 8))  # two layers, rank 4
    >>> factors = {"layers": {"self_attn": {"q_proj": {"a": a, "b": b}}}}
    >>> config = fs.LoraConfig(rank=4, alpha=8.0, targets=("q_proj",))
    >>> adapter = fs.Adapter(factors, config, base_model="org/model")
    >>> adapter.config.scale, adapter.base_model
    (2.0, 'org/model')
    """

    factors: dict
    config: LoraConfig
    base_model: str = ""


def expand_targets(targets: Sequence[str] | str) -> tuple[str, ...]:
    """Returns projection names; "all-linear" stands for all seven.

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


def init(key: jax.Array, config: DecoderConfig, lora: LoraConfig) -> dict:
    """Draws fresh factors: `a` uniform in +-1/sqrt(in) as in PEFT, `b` zero, so `a @ b` is zero.

    Args:
      key: PRNG key.
      config: the base model's config.
      lora: rank and targets.

    Returns:
      Factors, float32, as in the module's docstring.
    """
    factors: dict = {}
    for i, name in enumerate(lora.targets):
        fan_in, fan_out = config.projection_shape(name)
        bound = 1 / math.sqrt(fan_in)
        shape = (config.num_layers, fan_in, lora.rank)
        pair = {
            "a": jax.random.uniform(jax.random.fold_in(key, i), shape, jnp.float32, -bound, bound),
            "b": jnp.zeros((config.num_layers, lora.rank, fan_out), jnp.float32),
        }
        factors.setdefault("layers", {}).setdefault(BLOCK_OF[name], {})[name] = pair
    return factors


def update_of(adapter: Adapter) -> Callable:
    """Returns the function that computes what merging adds to one kernel of the base.

    Args:
      adapter: factors and their scale.

    Returns:
      `(path of a kernel in the parameters, layer) -> scale * a @ b`, float32 `[in, out]`, or None
      for a kernel that the adapter does not change.
    """
    factors, scale = adapter.factors, adapter.config.scale

    @jax.default_matmul_precision("float32")
    def update(path, layer):
        node = factors
        for key in path[:-1]:
            node = node.get(key, {})
        if "a" not in node:
            return None
        # By jax wherever the factors lie: numpy sums in another order, and what a run and `fedsafe
        # export` write would differ in the last bit.
        return scale * jnp.matmul(node["a"][layer], node["b"][layer])

    return update


def check_base(adapter: Adapter, config: DecoderConfig) -> None:
    """Checks that an adapter fits a base model.

    Args:
      adapter: the adapter.
      config: the base model's config.

    Raises:
      ModelError: the adapter has another number of layers or other sizes than the base.
    """
    for block, projections in adapter.factors["layers"].items():
        for name, pair in projections.items():
            fan_in, fan_out = config.projection_shape(name)
            rank = pair["a"].shape[-1]
            expected = (config.num_layers, fan_in, rank), (config.num_layers, rank, fan_out)
            shapes = pair["a"].shape, pair["b"].shape
            if shapes != expected:
                raise ModelError(
                    f"the adapter belongs to another base{_named(adapter.base_model)}: its "
                    f"{block}.{name} has factors {shapes[0]} and {shapes[1]} (layers first), "
                    f"this model needs {expected[0]} and {expected[1]}."
                    + (LAYERS_HINT if shapes[0][1:] == expected[0][1:] else "")
                )


def _named(base_model: str) -> str:
    return f" ({base_model})" if base_model else ""


def peft_tensors(factors: dict) -> dict[str, np.ndarray]:
    """Returns PEFT's tensors of factors: `lora_A` `[rank, in]` and `lora_B` `[out, rank]`."""
    tensors = {}
    for block, projections in factors["layers"].items():
        for name, pair in projections.items():
            for letter, stacked in (("A", pair["a"]), ("B", pair["b"])):
                for i, leaf in enumerate(np.asarray(jax.device_get(stacked))):
                    stem = f"{PEFT_PREFIX}.{i}.{block}.{name}"
                    tensors[f"{stem}.lora_{letter}.weight"] = np.ascontiguousarray(leaf.T)
    return tensors


def save_adapter(adapter: Adapter, folder: str | os.PathLike[str], base_model: str = "") -> None:
    """Writes PEFT's `adapter_config.json` and `adapter_model.safetensors`.

    Args:
      adapter: factors and their configuration.
      folder: folder to write to, created if missing.
      base_model: the base that PEFT is to load, "" for the adapter's own. A folder is recorded by
        its absolute path, `package:model` by that of the packaged one, a Hub id as it is.

    >>> import pathlib, tempfile
    >>> import jax.numpy as jnp
    >>> import fedsafe_jax as fs
    >>> pair = {"a": jnp.ones((1, 8, 2)), "b": jnp.zeros((1, 2, 6))}
    >>> config = fs.LoraConfig(rank=2, alpha=4.0, targets=("up_proj",))
    >>> adapter = fs.Adapter({"layers": {"mlp": {"up_proj": pair}}}, config)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fs.save_adapter(adapter, folder, base_model="org/model")
    ...     sorted(path.name for path in pathlib.Path(folder).iterdir())
    ['adapter_config.json', 'adapter_model.safetensors']
    """
    folder, lora = pathlib.Path(folder), adapter.config
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        peft_tensors(adapter.factors),
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_names.loadable(base_model or adapter.base_model),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": sorted(lora.targets),
        "lora_dropout": lora.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": lora.rank_stabilized,
    }
    write_json(folder / "adapter_config.json", content)


def load_adapter(folder: str | os.PathLike[str]) -> Adapter:
    """Reads an adapter in PEFT's format.

    Args:
      folder: folder with `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
      ModelError: files are missing, or the adapter is not a plain LoRA of the projections of all
        layers.

    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> import fedsafe_jax as fs
    >>> pair = {"a": jnp.ones((1, 8, 2)), "b": jnp.zeros((1, 2, 6))}
    >>> config = fs.LoraConfig(rank=2, alpha=4.0, targets=("up_proj",))
    >>> adapter = fs.Adapter({"layers": {"mlp": {"up_proj": pair}}}, config, "org/model")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fs.save_adapter(adapter, folder)
    ...     adapter = fs.load_adapter(folder)
    >>> adapter.config.rank, adapter.base_model
    (2, 'org/model')
    >>> adapter.factors["layers"]["mlp"]["up_proj"]["a"].shape
    (1, 8, 2)
    """
    folder = pathlib.Path(folder)
    given, path = peft_config.read(folder), folder / "adapter_model.safetensors"
    by_factor = _read_factors(path, given.rank)
    factors: dict = {}
    for (block, name), by_letter in sorted(by_factor.items()):
        node = factors.setdefault("layers", {}).setdefault(block, {}).setdefault(name, {})
        for letter in ("A", "B"):
            by_layer = by_letter.get(letter, {})
            if other := sorted(set(by_letter.get("A", {})) ^ set(by_letter.get("B", {}))):
                stem = f"{PEFT_PREFIX}.{other[0]}.{block}.{name}"
                lacks = "B" if other[0] in by_letter.get("A", {}) else "A"
                raise ModelError(f"{path}: tensor '{stem}.lora_{lacks}.weight' is missing.")
            if sorted(by_layer) != list(range(len(by_layer))):
                raise ModelError(
                    f"{path}: {name} is adapted in layers {sorted(by_layer)} only "
                    "(layers_to_transform of PEFT); expected all layers."
                )
            stacked = np.stack([by_layer[i] for i in range(len(by_layer))])
            node[letter.lower()] = jnp.asarray(stacked)
    counts = {name: len(by_letter["A"]) for (_, name), by_letter in by_factor.items()}
    stems = {f"{block}.{name}": counts[name] for block, name in by_factor}
    peft_config.check_targets(
        given,
        adapted={f"model.layers.{i}.{stem}" for stem, n in stems.items() for i in range(n)},
        known={
            f"model.layers.{i}.{block}.{name}"
            for name, block in BLOCK_OF.items()
            for i in range(max(counts.values()))
        },
        path=path,
    )
    names = tuple(name for name in BLOCK_OF if name in counts)
    config = LoraConfig(
        given.rank,
        given.alpha,
        names,
        rank_stabilized=given.rank_stabilized,
        dropout=given.dropout,
    )
    return Adapter(factors, config, given.base_model)


def _read_factors(
    path: pathlib.Path, rank: int
) -> dict[tuple[str, str], dict[str, dict[int, np.ndarray]]]:
    """Reads the factors of a file as `{(block, projection): {"A": {layer: float32 [in, rank]}}}`.

    Raises:
      ModelError: damaged files, tensors that are no factors of projections, of another rank, of a
        type that is not supported, or with numbers that are not finite.
    """
    if not os.path.isfile(path):
        raise ModelError(f"{path}: no such file; pickled adapters (.bin) are not loaded.")
    pattern = re.compile(
        rf"{re.escape(PEFT_PREFIX)}\.([0-9]{{1,5}})\.(\w+)\.(\w+)\.lora_([AB])\.weight"
    )
    factors: dict = {}
    try:
        with safe_open(path, framework="numpy") as file:
            for key in sorted(file.keys()):
                match = pattern.fullmatch(key)
                if not match or BLOCK_OF.get(match[3]) != match[2]:
                    raise ModelError(
                        f"{path}: tensor '{key[:200]}' belongs to no known projection."
                    )
                part = file.get_slice(key)
                shape, dtype = part.get_shape(), part.get_dtype()
                if dtype not in FLOATS:
                    raise ModelError(
                        f"{path}: tensor '{key}' has type {dtype}, which is not supported; "
                        f"expected {', '.join(FLOATS)}."
                    )
                axis = 0 if match[4] == "A" else 1
                if len(shape) != 2 or shape[axis] != rank:
                    raise ModelError(
                        f"{path}: tensor '{key}' has shape {list(shape)}, but "
                        f"adapter_config.json says r={rank}."
                    )
                tensor = part[:].astype(np.float32)
                check_finite(tensor, f"{path}: tensor '{key}'")
                if (most := float(np.abs(tensor).max(initial=0.0))) > MOST_FACTOR:
                    raise ModelError(
                        f"{path}: tensor '{key}' has the number {most:.3g}; expected at most "
                        f"{MOST_FACTOR:,}, far above those of any adapter."
                    )
                by_letter = factors.setdefault((match[2], match[3]), {})
                by_layer = by_letter.setdefault(match[4], {})
                if by_layer and next(iter(by_layer.values())).shape != tensor.T.shape:
                    raise ModelError(
                        f"{path}: tensor '{key}' has another shape than other layers'."
                    )
                by_layer[int(match[1])] = tensor.T
    except SafetensorError as error:
        raise ModelError(f"{path}: damaged or cut off ({error}).") from error
    if not factors:
        raise ModelError(f"{path}: holds no tensor.")
    return factors
