"""Reading and writing of Hugging Face folders as pytrees, tensor by tensor.

Names are derived, not listed: the leaf `layers/self_attn/q_proj/kernel` of `decoder.param_shapes`
is, for each layer i, the tensor `model.layers.{i}.self_attn.q_proj.weight`, transposed.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fedsafe_jax.models import config_fields
from fedsafe_jax.models.decoder import param_shapes
from fedsafe_jax.models.decoder_config import DecoderConfig, ModelError, from_hf
from fedsafe_jax.models.model_files import (
    INDEX,
    SINGLE,
    Tensors,
    check_finite,
    read_json,
    write_json,
)
from fedsafe_jax.models.quantize import Quantized, dequantize, quantize
from fedsafe_jax.models.sharding import fetch, is_shared, leaf_sharding, share, writes
from fedsafe_jax.models.tensor_files import save_file

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Pickled weights and remote code may run anything, so neither is downloaded.
FETCHED_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
# Weights that some models hold again in another layout: Mistral's consolidated.safetensors, and
# what lies in subfolders, such as Meta's original/. Templates may lie in one.
SECOND_COPIES = ["consolidated*", "*/*.json", "*/*.safetensors", "*/*.model", "*/*.txt"]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
COMPARED_ROWS = 4096  # rows of a head and an embedding that are compared at once
# Ends of names that tensors of quantised checkpoints have, and no others.
QUANTISED_SUFFIXES = (
    "qweight", "qzeros", "weight_scale", "weight_scale_inv", "weight_packed", "input_scale",
    "weight_scale_2", ".SCB", "absmax", "quant_map", "_blocks", "_scales", "g_idx",
)  # fmt: skip
LEAF_NAMES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
# Buffers of old checkpoints, which every loader computes itself.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)


def resolve(path_or_hub_id: str) -> pathlib.Path:
    """Returns a local folder as it is, or the downloaded snapshot of a Hub model.

    Raises:
      ModelError: neither a folder nor a model that the Hub serves.
    """
    path = pathlib.Path(path_or_hub_id)
    if os.path.isdir(path):  # pathlib raises where a name is too long for any folder
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


def hf_config(raw: dict) -> "PretrainedConfig":
    """Returns the transformers config of a `config.json`, with defaults for missing fields.

    Raises:
      ModelError: quantised weights, a family that is not supported, or a field that is not.
    """
    config_fields.check_quantised(raw)
    config_fields.check_fields(raw, config_fields.DECODER_FIELDS)
    hf = config_fields.complete(raw)
    config_fields.check_decoder(hf)
    return hf


def read_config(folder: pathlib.Path, dtype: str = "float32") -> DecoderConfig:
    """Reads `config.json`, in the spelling of transformers 4 or 5.

    A flag `tie_word_embeddings` beside an `lm_head.weight` of other values than the embedding's is
    taken back, as in transformers 5: such a folder comes from merging an adapter of the head.

    Raises:
      ModelError: no config, or a model that the decoder does not cover.
    """
    folder = pathlib.Path(folder)
    path = folder / "config.json"
    raw = read_json(path)
    with config_fields.naming(path):
        config = from_hf(hf_config(raw), dtype)
    if config.tie_embeddings and has_own_head(folder):
        config = dataclasses.replace(config, tie_embeddings=False)
    return config


def has_own_head(folder: pathlib.Path) -> bool:
    """Returns whether a folder has an `lm_head.weight` that is not its embedding's.

    Folders without weights have none. Both are read in parts, so that neither is held whole.

    Raises:
      ModelError: damaged files.
    """
    if not any((folder / name).is_file() for name in (SINGLE, INDEX)):
        return False
    tensors = Tensors(folder)
    if not {HEAD, EMBEDDING} <= tensors.names():
        return False
    if (shape := tensors.shape(HEAD)) != tensors.shape(EMBEDDING):
        return True
    for name in (HEAD, EMBEDDING):
        tensors.check_dtype(name)
    return any(
        not np.array_equal(tensors.read(HEAD, rows), tensors.read(EMBEDDING, rows))
        for start in range(0, shape[0], COMPARED_ROWS)
        for rows in [(slice(start, start + COMPARED_ROWS), slice(None))]
    )


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
            names = (HEAD,)
        else:
            names = (".".join(("model", path[0], "weight")),)
        transposed = path[-1] in ("kernel", "lm_head")
        places.append(Leaf(path, shape.shape, names, stacked=stacked, transposed=transposed))
    return places


def check_tensors(tensors: Tensors, config: DecoderConfig) -> None:
    """Checks that a folder has exactly the tensors of its config, in their shapes.

    Raises:
      ModelError: tensors are missing, unknown, of another shape or type; the message names the
        first.
    """
    expected = {name: leaf for leaf in leaves(config) for name in leaf.names}
    ignored = IGNORED_SUFFIXES + ((HEAD,) if config.tie_embeddings else ())
    extra = {n for n in tensors.names() if not n.endswith(ignored)} - set(expected)
    missing = set(expected) - tensors.names()
    if codes := sorted(n for n in extra if n.endswith(QUANTISED_SUFFIXES)):
        raise ModelError(
            f"{tensors.folder}: the weights are quantised, which is not supported (tensor "
            f"'{codes[0]}'); use the unquantised model."
        )
    if missing == {HEAD}:
        raise ModelError(
            f"{tensors.folder}: tensor '{HEAD}' is missing, and config.json does not tie it to "
            "the embedding (tie_word_embeddings is false)."
        )
    for what, names in (("missing", missing), ("not of this model", extra)):
        if names:
            some = ", ".join(n[:100] for n in sorted(names)[:3]) + (
                ", ..." if len(names) > 3 else ""
            )
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
        tensors.check_dtype(name)


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
                check_finite(out[i if leaf.stacked else ...], f"{tensors.folder}: tensor '{name}'")
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
