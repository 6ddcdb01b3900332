"""Writing of a Hugging Face folder as a GGUF file, which llama.cpp runs.

Of the Llama architecture with a byte-level tokenizer alone, unquantised; llama.cpp's own tools
convert other families and quantise.
"""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import logging

from fedsafe_jax import whole_files
from fedsafe_jax.models import hub
from fedsafe_jax.models.decoder_config import DecoderConfig, ModelError
from fedsafe_jax.models.gguf_config import END_TOKENS, ROPE_FACTORS, llama3_divisors
from fedsafe_jax.models.gguf_folder import PERMUTED, permuted, tensor_names
from fedsafe_jax.models.gguf_reader import check_package
from fedsafe_jax.models.gguf_tokenizer import SPLITTINGS, pre_tokenizer
from fedsafe_jax.models.model_files import Tensors, check_finite, read_json
from fedsafe_jax.models.tokenizer_loading import read_tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

ARCHITECTURE = "llama"
# Types that are written, by numpy's name, with llama.cpp's number for a file of them.
DTYPES = {"float16": 1, "float32": 0}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


def write_file(
    folder: str | os.PathLike[str], path: str | os.PathLike[str], dtype: str = "float16"
) -> None:
    """Writes a Llama folder as a GGUF file, one tensor at a time.

    Args:
      folder: a Hugging Face folder.
      path: the file, in a folder that exists.
      dtype: type of the matrices, of `DTYPES`; norms and biases are float32.

    Raises:
      ModelError: another family or kind of tokenizer, a damaged folder, or a number that float16
        does not hold.
      StorageError: the disk does not take it.
    """
    check_package()
    from gguf import GGUFWriter

    folder, path = pathlib.Path(folder), pathlib.Path(path)
    if dtype not in DTYPES:
        raise ModelError(f"dtype='{dtype}': GGUF is written in {' or '.join(DTYPES)}.")
    raw = read_json(folder / "config.json")
    if (family := raw.get("model_type")) != ARCHITECTURE:
        raise ModelError(
            f"{folder}: model_type '{family}' is not written as GGUF; expected {ARCHITECTURE}. "
            "llama.cpp's convert_hf_to_gguf.py converts other families."
        )
    config = hub.read_config(folder)
    tensors = Tensors(folder)
    hub.check_tensors(tensors, config)
    writer = GGUFWriter(None, ARCHITECTURE)
    _add_config(writer, config, dtype)
    _add_tokenizer(writer, folder, config)
    names = tensor_names(config, ARCHITECTURE)
    for name, own in names.items():
        shape = tensors.shape(name)
        kind = np.dtype(dtype if len(shape) > 1 else "float32")
        size = int(np.prod(shape)) * kind.itemsize
        writer.add_tensor_info(own, shape, tensor_dtype=kind, tensor_nbytes=size)
    divisors = None
    if config.rope_scaling is not None:
        scaling = dict(
            zip(
                ("factor", "low_freq_factor", "high_freq_factor"),
                config.rope_scaling[:3],
                strict=True,
            ),
            original_max_position_embeddings=config.rope_scaling[3],
        )
        divisors = llama3_divisors(scaling, config.head_dim, config.rope_theta)
        writer.add_tensor_info(
            ROPE_FACTORS,
            divisors.shape,
            tensor_dtype=divisors.dtype,
            tensor_nbytes=divisors.nbytes,
        )
    with whole_files.storage(path), whole_files.replaced(path) as new:
        writer.write_header_to_file(new)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name in names:
            writer.write_tensor_data(_tensor(tensors, name, config, dtype))
        if divisors is not None:
            writer.write_tensor_data(divisors)
        writer.close()


def _tensor(tensors: Tensors, name: str, config: DecoderConfig, dtype: str) -> np.ndarray:
    """Reads a tensor as llama.cpp has it."""
    axes = len(tensors.shape(name))
    array = tensors.read(name, (slice(None),) * axes).astype(np.float32)
    if (projection := name.split(".")[-2]) in PERMUTED:
        array = permuted(array, getattr(config, PERMUTED[projection]))
    with np.errstate(over="ignore"):  # what is too large is infinite then, and said
        array = array.astype(dtype if axes > 1 else np.float32)
    check_finite(array, f"{tensors.folder}: tensor '{name}'")
    return np.ascontiguousarray(array)


def _add_config(writer: "GGUFWriter", config: DecoderConfig, dtype: str) -> None:
    from gguf import RopeScalingType

    if config.windowed_layers or config.unrotated_layers:
        raise ModelError("a Llama with windows, or with layers without rotation, is not written.")
    writer.add_name(ARCHITECTURE)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(DTYPES[dtype])
    if config.rope_factor != 1:
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_factor)


def _add_tokenizer(writer: "GGUFWriter", folder: pathlib.Path, config: DecoderConfig) -> None:
    """Writes the tokens, merges, special ids and chat template of a byte-level tokenizer."""
    tokenizer = read_tokenizer(folder)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = {} if backend is None else json.loads(backend.to_str())
    pre = _splitting(state, folder)
    ids = {i: token for token, i in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for i in range(config.vocab_size):
        tokens.append(ids.get(i, f"[PAD{i}]"))  # llama.cpp wants a token for each row
        kind = NORMAL if i in ids else UNUSED
        if i in added:
            kind = CONTROL if added[i].special else USER_DEFINED
        types.append(kind)
    merges = [m if isinstance(m, str) else " ".join(m) for m in state["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_add_space_prefix(False)
    special = {
        "bos": (tokenizer.bos_token_id, writer.add_bos_token_id),
        "unk": (tokenizer.unk_token_id, writer.add_unk_token_id),
        "pad": (tokenizer.pad_token_id, writer.add_pad_token_id),
    }
    for number, add in special.values():
        if number is not None and number < config.vocab_size:
            add(number)
    adders = {
        "eos": writer.add_eos_token_id,
        "eot": writer.add_eot_token_id,
        "eom": writer.add_eom_token_id,
    }
    ends = _end_tokens(folder, tokenizer)
    for name, number in zip(END_TOKENS, ends, strict=False):
        adders[name](number)
    if lost := ends[len(END_TOKENS) :]:
        logging.warning("%s: GGUF has no place for the end tokens %s.", folder, lost)
    bos = tokenizer.bos_token_id
    writer.add_add_bos_token(bos is not None and tokenizer("a")["input_ids"][:1] == [bos])
    if tokenizer.chat_template:
        writer.add_chat_template(str(tokenizer.chat_template))


def _splitting(state: Mapping[str, Any], folder: pathlib.Path) -> str:
    """Returns llama.cpp's name of how a tokenizer splits texts.

    Raises:
      ModelError: it is not byte-level, or llama.cpp has no name for it.
    """
    model = state.get("model", {})
    if model.get("type") == "BPE" and not model.get("byte_fallback"):
        given = _plain(state.get("pre_tokenizer"))
        composed = state.get("normalizer") == {"type": "NFC"}
        if composed or state.get("normalizer") is None:
            for name, splitting in SPLITTINGS.items():
                same = (bool(model.get("ignore_merges")), composed) == (
                    splitting.whole_words,
                    splitting.composed,
                )
                if same and given == _plain(json.loads(_state_of(splitting))):
                    return name
    raise ModelError(
        f"{folder}: the tokenizer is not written as GGUF: expected byte-level BPE that splits "
        f"texts as one of {', '.join(SPLITTINGS)} does."
    )


def _state_of(splitting: Any) -> str:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizer(splitting)
    return json.dumps(json.loads(tokenizer.to_str())["pre_tokenizer"])


def _plain(state: Any) -> Any:
    """Returns a pre-tokenizer's state without what changes no token."""
    if isinstance(state, dict):
        return {k: _plain(v) for k, v in state.items() if k != "trim_offsets"}
    return [_plain(part) for part in state] if isinstance(state, list) else state


def _end_tokens(folder: pathlib.Path, tokenizer: Any) -> list[int]:
    """Returns the ids that end an answer, the tokenizer's own first."""
    path = folder / "generation_config.json"
    named = read_json(path).get("eos_token_id") if path.is_file() else None
    named = named if isinstance(named, list) else [named]
    own = [tokenizer.eos_token_id, *named]
    return list(dict.fromkeys(i for i in own if isinstance(i, int)))
