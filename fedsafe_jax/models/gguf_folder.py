"""A GGUF file as a Hugging Face folder, in the user's cache or wherever it is wanted.

All that reads a model reads a folder. A file becomes one once, under the hash of its content:
float16 and bfloat16 tensors keep their values and type, all others are dequantised to float32.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import logging
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from fedsafe_jax import own_folder, whole_files
from fedsafe_jax.models import config_fields, gguf_config, gguf_tokenizer, hub, hub_files
from fedsafe_jax.models.decoder_config import DecoderConfig, ModelError, from_hf
from fedsafe_jax.models.gguf_reader import GgufFile, check_start
from fedsafe_jax.models.model_files import INDEX, check_finite, write_json
from fedsafe_jax.models.tensor_files import save_file
from fedsafe_jax.models.tokenizer_loading import read_tokenizer

FORM = 1  # of converted folders: the next one where the same file gives other content
SHARD_BYTES = 10**9  # of a written file, which is what the host holds at once
# Tensors that only other programs need: they are computed from the config here.
IGNORED = {gguf_config.ROPE_FACTORS}
PERMUTED = {"q_proj": "num_heads", "k_proj": "num_kv_heads"}


def cached(path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the folder of a GGUF file in the user's cache, made if it is not there.

    Several processes may ask at once, and be killed: one makes it, under a name of its own until it
    is whole. It may be deleted at any time.

    Args:
      path: the file.

    Raises:
      ModelError: no GGUF file, a damaged or unsupported one, or one that changes meanwhile.
      WorkdirError: the cache cannot be written to, or others may write to it.
    """
    path = pathlib.Path(path)
    check_start(path)
    digest = _digest(path)
    try:
        home = own_folder.cache("models")
    except whole_files.WorkdirError as error:
        raise whole_files.WorkdirError(
            f"{path}: GGUF is kept as a folder of your cache, but {str(error).rstrip('.')}; set "
            "XDG_CACHE_HOME to a folder of your own, or use fedsafe convert."
        ) from error
    folder = home / f"gguf{FORM}-{digest[:32]}"
    if folder.is_dir():
        return folder
    with _alone(home) as alone:
        if folder.is_dir():
            return folder
        if alone:
            whole_files.remove_left(home, folder.name)
        with whole_files.storage(home):
            new = tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=home)
        try:
            write_folder(path, new)
            if _digest(path) != digest:
                raise ModelError(f"{path}: changed while it was read; start again.")
            _rename(new, folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    size = sum(file.stat().st_size for file in folder.iterdir())
    logging.warning("%s is kept as %s (%.1f GB), which may be deleted.", path, folder, size / 1e9)
    return folder


def write_folder(
    path: str | os.PathLike[str], folder: str | os.PathLike[str], dtype: str = ""
) -> None:
    """Writes a GGUF file as a Hugging Face folder: weights, config, tokenizer, chat template.

    Args:
      path: the file.
      folder: an existing folder.
      dtype: type of all weights; "" for the file's float16 and bfloat16, and float32 for all else.

    Raises:
      ModelError: no GGUF file, or a damaged or unsupported one.
      StorageError: the disk does not take it.
    """
    path, folder = pathlib.Path(path), pathlib.Path(folder)
    file = GgufFile(path)
    raw = gguf_config.config_of(file)
    with config_fields.naming(path):
        config = from_hf(hub.hf_config(raw))
        names = tensor_names(config, gguf_config.architecture(file))
    _check_tensors(file, config, names)
    kinds = {file.tensors[name].kind for name in names.values()} - {"F32"}
    plain = {"F16": "float16", "BF16": "bfloat16"}
    widest = dtype or (plain.get(*kinds, "float32") if len(kinds) == 1 else "float32")
    ids = gguf_config.token_ids(file)
    with whole_files.storage(folder):
        for name, text in gguf_tokenizer.files_of(file).items():
            whole_files.write(folder / name, text.encode("utf-8", "surrogatepass"))
        architectures = {"architectures": [_class_of(raw["model_type"])]}
        write_json(folder / "config.json", hub_files.config_for_all(raw | architectures, widest))
        write_json(folder / "generation_config.json", ids)
        try:
            hub.read_config(folder)
            tokenizer = read_tokenizer(folder)
        except ModelError as error:  # of the file's content, and the folder may be gone soon
            raise ModelError(str(error).replace(str(folder), str(path))) from error
        hub_files.check_vocabulary(tokenizer, config.vocab_size, where=path, configs=(raw, ids))
        _write_weights(file, folder, config, names=names, dtype=dtype)


def tensor_names(config: DecoderConfig, arch: str) -> dict[str, str]:
    """Returns the names of tensors in a GGUF file by those in a Hugging Face folder.

    Args:
      config: the model's config.
      arch: architecture of the file, such as "llama".

    Raises:
      ModelError: files of this architecture have no place for a tensor, such as a Gemma's head.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    numbers = {name: number for number, name in MODEL_ARCH_NAMES.items()}
    table = get_tensor_name_map(numbers[arch], config.num_layers)
    names = {}
    for leaf in hub.leaves(config):
        for name in leaf.names:
            stem, _, last = name.rpartition(".")
            if (own := table.get_name(stem)) is None:
                raise ModelError(f"tensor '{name}' has no name in GGUF files of {arch}.")
            names[name] = f"{own}.{last}"
    return names


def permuted(array: np.ndarray, heads: int, back: bool = False) -> np.ndarray:
    """Reorders the outputs of q or k of a Llama, whose halves of a head GGUF has side by side.

    llama.cpp rotates neighbouring numbers; transformers a number of the first half with one of the
    second (`LlamaModel.permute` of llama.cpp's conversion).

    Args:
      array: kernel `[out, in]` or bias `[out]`.
      heads: number of heads in `out`.
      back: from GGUF's order to transformers'.
    """
    half = array.shape[0] // heads // 2
    sizes = (half, 2) if back else (2, half)
    return array.reshape(heads, *sizes, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _class_of(model_type: str) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]


def _check_tensors(file: GgufFile, config: DecoderConfig, names: dict[str, str]) -> None:
    """Checks that a file has exactly the tensors of its config, in their shapes."""
    missing = set(names.values()) - file.tensors.keys()
    extra = file.tensors.keys() - set(names.values()) - IGNORED
    for what, which in (("missing", missing), ("not of this model", extra)):
        if which:
            some = ", ".join(name[:60] for name in sorted(which)[:3])
            raise ModelError(
                f"{file.path}: {len(which)} tensors are {what}: {some}"
                f"{', ...' if len(which) > 3 else ''}. They do not belong to the file's fields."
            )
    for leaf in hub.leaves(config):
        for name in leaf.names:
            shape = file.tensors[names[name]].shape
            if shape != leaf.tensor_shape:
                raise ModelError(
                    f"{file.path}: tensor '{names[name]}' has shape {list(shape)}, the file's "
                    f"fields ask for {list(leaf.tensor_shape)}."
                )


def _tensor(file: GgufFile, name: str, own: str, config: DecoderConfig) -> np.ndarray:
    """Reads a tensor as transformers has it.

    Args:
      file: the opened file.
      name: its name in a Hugging Face folder.
      own: its name in the file.
      config: the model's config.
    """
    array = file.read(own)
    projection = name.split(".")[-2]
    if file.text("general.architecture") == "llama" and projection in PERMUTED:
        array = permuted(array, getattr(config, PERMUTED[projection]), back=True)
    if config.norm_offset and array.ndim == 1 and name.endswith("norm.weight"):
        # llama.cpp multiplies by the scale alone, so that files hold it with the offset.
        array = array.astype(np.float32) - np.float32(config.norm_offset)
    return array


def _write_weights(
    file: GgufFile, folder: pathlib.Path, config: DecoderConfig, names: dict[str, str], dtype: str
) -> None:
    """Writes safetensors, with an index where they take several files."""
    from huggingface_hub import split_state_dict_into_shards_factory

    items = {"F16": 2, "BF16": 2}
    plan = split_state_dict_into_shards_factory(
        {name: file.tensors[own] for name, own in names.items()},
        get_storage_size=lambda t: (
            int(np.prod(t.shape)) * (jnp.dtype(dtype).itemsize if dtype else items.get(t.kind, 4))
        ),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    for shard, members in plan.filename_to_tensors.items():
        tensors = {}
        for name in members:
            array = _tensor(file, name, names[name], config)
            array = array.astype(jnp.dtype(dtype) if dtype else array.dtype, copy=False)
            check_finite(array, f"{file.path}: tensor '{names[name]}'")
            tensors[name] = np.ascontiguousarray(array)
        save_file(tensors, folder / shard, metadata={"format": "pt"})
    if plan.is_sharded:
        index: dict[str, Any] = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / INDEX, index)


def _digest(path: pathlib.Path) -> str:
    """Returns the SHA-256 of a file; one that has not changed is read once a process."""
    with whole_files.storage(path, "cannot be read"):
        stat = path.stat()
        known = stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
        return _sha256(path.resolve(), known)


@functools.lru_cache(maxsize=64)
def _sha256(path: pathlib.Path, known: tuple[int, ...]) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _alone(home: pathlib.Path) -> Iterator[bool]:
    """Lets one process convert at a time; gives False on a disk that has no locks.

    The lock goes with the process that has it, however that ends.
    """
    with whole_files.storage(home / "lock"), open(home / "lock", "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            alone = True
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS):
                raise
            alone = False
        yield alone


def _rename(new: str, folder: pathlib.Path) -> None:
    """Gives a folder its name, unless another process has made it meanwhile."""
    try:
        os.rename(new, folder)
    except OSError:
        if not folder.is_dir():
            raise
