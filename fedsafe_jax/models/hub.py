"""Reading and writing of Hugging Face folders as pytrees, tensor by tensor.

Names are derived, not listed: the leaf `layers/self_attn/q_proj/kernel` of `decoder.param_shapes`
is, for each layer i, the tensor `model.layers.{i}.self_attn.q_proj.weight`, transposed.
"""

import functools
import json
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open

from fedsafe_jax.models.decoder import param_shapes
from fedsafe_jax.models.decoder_config import FAMILIES, DecoderConfig, ModelError, from_hf
from fedsafe_jax.models.quantize import Quantized, dequantize, quantize
from fedsafe_jax.models.sharding import fetch, is_shared, leaf_sharding, share, writes
from fedsafe_jax.models.tensor_files import save_file

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Pickled weights and remote code may run anything, so neither is downloaded.
FETCHED_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
# Weights that some models hold again in another layout: Mistral's consolidated.safetensors, and
# what lies in subfolders, such as Meta's original/. Templates may lie in one.
SECOND_COPIES = ["consolidated*", "*/*.json", "*/*.safetensors", "*/*.model", "*/*.txt"]
LEAF_NAMES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
# Buffers of old checkpoints, which every loader computes itself.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)


def resolve(path_or_hub_id: str) -> pathlib.Path:
    """Returns a local folder as it is, or the downloaded snapshot of a Hub model.

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
        return pathlib.Path(
            snapshot_download(
                path_or_hub_id, allow_patterns=FETCHED_FILES, ignore_patterns=SECOND_COPIES
            )
        )
    except Exception as error:
        raise ModelError(
            f"model '{path_or_hub_id}' could not be loaded from the Hub: {error}"
        ) from error


def read_json(path: pathlib.Path) -> dict:
    """Reads an object from a JSON file of a model folder.

    Raises:
      ModelError: no such file, or not JSON.
    """
    if not path.is_file():
        raise ModelError(f"{path}: no such file; a Hugging Face model folder holds a {path.name}.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: not JSON ({error}).") from error


def hf_config(raw: dict) -> "PretrainedConfig":
    """Returns the transformers config of a `config.json`, with defaults for missing fields.

    Raises:
      ModelError: a family that is not supported.
    """
    from transformers import AutoConfig

    family = raw.get("model_type", "none given")
    if family not in FAMILIES:
        raise ModelError(
            f"model_type '{family}' is not supported; supported are {', '.join(sorted(FAMILIES))}."
        )
    return AutoConfig.for_model(**raw)


def read_config(folder: pathlib.Path, dtype: str = "float32") -> DecoderConfig:
    """Reads `config.json`, in the spelling of transformers 4 or 5.

    Raises:
      ModelError: no config, or a model that the decoder does not cover.
    """
    path = pathlib.Path(folder) / "config.json"
    raw = read_json(path)
    try:
        return from_hf(hf_config(raw), dtype)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None


class Leaf(NamedTuple):
    """Place of a leaf of the base parameters in a Hugging Face folder.

    Attributes:
      path: keys of the leaf in the pytree.
      shape: shape of the leaf, `[layers, in, out]`, or without layers.
      names: names of its tensors, one for each layer, or a single one.
      stacked: whether the leaf has a leading axis of layers.
      transposed: whether the tensors are transposed; torch keeps linear weights as `[out, in]`.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    names: tuple[str, ...]
    stacked: bool
    transposed: bool

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of each of the leaf's tensors in the folder."""
        shape = self.shape[1:] if self.stacked else self.shape
        return shape[::-1] if self.transposed else shape


def leaves(config: DecoderConfig) -> list[Leaf]:
    """Returns the places of all leaves of the base parameters."""
    places = []
    for keys, shape in jax.tree_util.tree_leaves_with_path(param_shapes(config)):
        path = tuple(key.key for key in keys)
        stacked = path[0] == "layers"
        last = LEAF_NAMES.get(path[-1])
        if stacked:
            stem = ".".join((*path[1:-1], last))
            names = tuple(f"model.layers.{i}.{stem}" for i in range(config.num_layers))
        elif path == ("lm_head",):
            names = ("lm_head.weight",)
        else:
            names = (".".join(("model", path[0], "weight")),)
        transposed = path[-1] in ("kernel", "lm_head")
        places.append(Leaf(path, shape.shape, names, stacked=stacked, transposed=transposed))
    return places


class Tensors:
    """Safetensors of a folder, single or sharded by an index, read lazily.

    Args:
      folder: a Hugging Face folder.

    Raises:
      ModelError: no safetensors, a missing or damaged file, or a tensor that is not in the file
        that the index names.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = pathlib.Path(folder)
        if (self.folder / INDEX).is_file():
            self._file_of = read_json(self.folder / INDEX)["weight_map"]
        elif (self.folder / SINGLE).is_file():
            self._file_of = dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        else:
            pickled = sorted(p.name for p in self.folder.glob("*.bin"))
            hint = (
                f" It has {pickled[0]}: pickled weights are not loaded, as they may run code. "
                "Convert them where you trust them: load the model in transformers and "
                "save_pretrained it."
                if pickled
                else ""
            )
            raise ModelError(f"{self.folder}: no {SINGLE} and no {INDEX}.{hint}")
        self._files = {name: self._open(name) for name in sorted(set(self._file_of.values()))}
        for name, file in self._file_of.items():
            if name not in self._keys(file):
                raise ModelError(f"{self.folder / INDEX}: '{name}' is not in {file}.")

    def _open(self, name: str):
        path = self.folder / name
        if not path.is_file():
            raise ModelError(f"{path}: no such file, though {INDEX} names it; download it again.")
        try:
            return safe_open(path, framework="numpy")
        except SafetensorError as error:
            raise ModelError(f"{path}: damaged or cut off ({error}); download it again.") from error

    def _keys(self, file: str) -> set[str]:
        return set(self._files[file].keys())

    def names(self) -> set[str]:
        """Returns the names of all tensors."""
        return set(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape."""
        return tuple(self._view(name).get_shape())

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a part of a tensor; only the bytes of that part are read from disk."""
        return self._view(name)[index]

    def _view(self, name: str):
        return self._files[self._file_of[name]].get_slice(name)


def check_tensors(tensors: Tensors, config: DecoderConfig) -> None:
    """Checks that a folder has exactly the tensors of its config, in their shapes.

    Raises:
      ModelError: tensors are missing, unknown or of another shape; the message names the first.
    """
    expected = {name: leaf for leaf in leaves(config) for name in leaf.names}
    ignored = IGNORED_SUFFIXES + (("lm_head.weight",) if config.tie_embeddings else ())
    extra = {n for n in tensors.names() if not n.endswith(ignored)} - set(expected)
    missing = set(expected) - tensors.names()
    for what, names in (("missing", missing), ("not of this model", extra)):
        if names:
            some = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise ModelError(
                f"{tensors.folder}: {len(names)} tensors are {what}: {some}. "
                "The weights do not belong to this config.json."
            )
    for name, leaf in expected.items():
        if (shape := tensors.shape(name)) != leaf.tensor_shape:
            raise ModelError(
                f"{tensors.folder}: tensor '{name}' has shape {list(shape)}, config.json "
                f"asks for {list(leaf.tensor_shape)}."
            )


def load_params(
    folder: pathlib.Path,
    config: DecoderConfig,
    dtype: str,
    mesh: Mesh | None = None,
    quantization: str = "",
) -> dict:
    """Loads base parameters one leaf at a time, a kernel to quantise one layer at a time.

    Each process reads the parts that its devices hold, each of them once. Host memory beyond the
    parameters themselves never exceeds one stacked leaf and one tensor; beside the codes of a
    quantised kernel, host and devices hold one layer of it.

    Args:
      folder: a folder with safetensors.
      config: the model's config, from `read_config`.
      dtype: dtype of the parameters.
      mesh: device mesh, whose axis `model` splits the leaves as in `sharding`; None for one device.
      quantization: "", or a kind of `quantize.KINDS` for the projections' kernels.

    Raises:
      ModelError: the files do not hold the tensors of this config.
    """
    tensors = Tensors(folder)
    check_tensors(tensors, config)
    params: dict = {}
    placed_on = None if is_shared(mesh) else mesh
    for leaf in leaves(config):
        if quantization and leaf.path[-1] == "kernel":
            array = _quantized(tensors, leaf, dtype, mesh=placed_on, kind=quantization)
        else:
            array = _placed(tensors, leaf, dtype, placed_on)
        if is_shared(mesh):
            array = share(array, mesh)
        node = params
        for key in leaf.path[:-1]:
            node = node.setdefault(key, {})
        node[leaf.path[-1]] = array
    return params


def _placed(tensors: Tensors, leaf: Leaf, dtype: str, mesh: Mesh | None) -> jax.Array:
    """Reads a leaf to its devices."""
    sharding = leaf_sharding(leaf.path, leaf.shape, mesh)
    return jax.make_array_from_callback(leaf.shape, sharding, _reader(tensors, leaf, dtype))


def _quantized(tensors: Tensors, leaf: Leaf, dtype: str, mesh: Mesh | None, kind: str) -> Quantized:
    """Reads a stacked kernel to its devices layer by layer, quantising each."""
    codes = None
    for i, name in enumerate(leaf.names):
        layer = leaf._replace(shape=leaf.shape[1:], names=(name,), stacked=False)
        quantized = quantize(_placed(tensors, layer, dtype, mesh), kind)
        if codes is None:
            codes = _repeated(quantized, len(leaf.names))
        else:
            codes = _with_layer(codes, quantized, i)
    return codes


@functools.partial(jax.jit, static_argnums=1)
def _repeated(layer: Quantized, count: int) -> Quantized:
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), layer)


@functools.partial(jax.jit, donate_argnums=0)
def _with_layer(stacked: Quantized, layer: Quantized, i: int) -> Quantized:
    return jax.tree.map(lambda whole, x: whole.at[i].set(x), stacked, layer)


def _reader(tensors: Tensors, leaf: Leaf, dtype: str) -> Callable:
    """Returns `(index, a tuple of slices) -> that part of the leaf`, a numpy array.

    A part is read once, although each copy of the base asks for it.
    """
    known: dict[tuple, np.ndarray] = {}

    def read(index):
        bounds = [part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True)]
        if (key := tuple(bounds)) not in known:
            out = np.empty([stop - start for start, stop in bounds], jnp.dtype(dtype))
            layers, inner = (index[0], index[1:]) if leaf.stacked else (slice(None), index)
            inner = inner[::-1] if leaf.transposed else inner
            for i, name in enumerate(leaf.names[layers]):
                part = tensors.read(name, inner)
                out[i if leaf.stacked else ...] = part.T if leaf.transposed else part
            known[key] = out
        return known[key]

    return read


def save_params(
    params: dict,
    config: DecoderConfig,
    folder: pathlib.Path,
    dtype: str,
    update: Callable | None = None,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes safetensors under Hugging Face names, with an index when they take several files.

    Where the parameters span processes, all of them call this, and the first one writes.

    Args:
      params: base parameters; quantised kernels are expanded.
      config: the model's config.
      folder: an existing folder.
      dtype: dtype of the written tensors.
      update: `(path, layer) -> float32 array or None`, added to a stacked leaf's layer: an adapter
        to merge, see `lora.update_of`. Only one tensor at a time is held merged.
      shard_bytes: largest size of a file, 5 GB as in transformers.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    folder, item = pathlib.Path(folder), jnp.dtype(dtype).itemsize
    places = {n: (leaf, i) for leaf in leaves(config) for i, n in enumerate(leaf.names)}
    plan = split_state_dict_into_shards_factory(
        {name: leaf for name, (leaf, _) in places.items()},
        get_storage_size=lambda leaf: int(np.prod(leaf.tensor_shape)) * item,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )

    def tensor(name):
        leaf, i = places[name]
        node = params
        for key in leaf.path:
            node = node[key]
        if leaf.stacked:
            node = jax.tree.map(lambda x: x[i], node)
        extra = update(leaf.path, i) if update and leaf.stacked else None
        if extra is not None:
            node = dequantize(node, jnp.float32) + extra
        host = np.asarray(fetch(dequantize(node, dtype)))
        return np.ascontiguousarray(host.T if leaf.transposed else host)

    here = writes(params)
    for file, names in plan.filename_to_tensors.items():
        tensors = {}
        for name in names:
            merged = tensor(name)  # where the parameters span processes, by all of them together
            if here:
                tensors[name] = merged
        if here:
            save_file(tensors, folder / file, metadata={"format": "pt"})
    if plan.is_sharded and here:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / INDEX, index)


def write_json(path: pathlib.Path, content: dict) -> None:
    """Writes indented JSON with a final newline."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    pathlib.Path(path).write_text(text, encoding="utf-8")
