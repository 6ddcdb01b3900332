"""Language models from and to disk: Hugging Face folders, GGUF files and models of the Hub."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from fedsafe_jax.inference.language_model import LanguageModel, end_tokens
from fedsafe_jax.inference.tokenizer import load_tokenizer
from fedsafe_jax.models import hub, hub_files, lora
from fedsafe_jax.models.base_model import model_folder
from fedsafe_jax.models.sharding import writes

DTYPES = ("float32", "bfloat16", "float16")  # of parameters and computation


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise hub.ModelError(f"dtype='{dtype}': expected one of {', '.join(DTYPES)}.")


def load_pretrained(
    path_or_hub_id: str,
    dtype: str = "float32",
    quantization: str = "",
    mesh: Mesh | None = None,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    date: str | None = None,
) -> LanguageModel:
    """Loads a Hugging Face model folder, a GGUF file or a Hub model as a `LanguageModel`.

    Args:
      path_or_hub_id: local folder or GGUF file, or `owner/name`; `package:model` is the packaged
        small model.
      dtype: type of parameters and computation, such as "bfloat16".
      quantization: "int8" or "nf4" for the projections' kernels, "" for none.
      mesh: devices to lay the parameters on, see `federated.mesh.make_mesh`.
      chat_template: replaces the tokenizer's, and is needed for a base model, which has none: a
        name of `data.named_templates.NAMED`, such as "alpaca", a file, or Jinja text.
      chat_template_kwargs: arguments of the chat template, such as `{"enable_thinking": True}`;
        thinking is off by default.
      date: day that the chat template writes, such as "2026-11-26"; today by default.

    Raises:
      ModelError: the folder is missing, damaged, or holds an unsupported model; or there is no such
        dtype.

    Example:
      >>> lm = load_pretrained("package:model", dtype="bfloat16", quantization="int8")
      >>> lm.config.num_layers, lm.config.dtype
      (4, 'bfloat16')
    """
    _check_dtype(dtype)
    folder = model_folder(path_or_hub_id)
    config = dataclasses.replace(hub.read_config(folder, dtype), mesh=mesh)
    tokenizer = load_tokenizer(folder, chat_template, chat_template_kwargs, date)
    generation_file = folder / "generation_config.json"
    hf_config = hub.read_json(folder / "config.json")
    generation_config = hub.read_json(generation_file) if generation_file.is_file() else {}
    hub_files.check_vocabulary(
        tokenizer, config.vocab_size, where=folder, configs=(hf_config, generation_config)
    )
    return LanguageModel(
        config,
        hub.load_params(folder, config, dtype, mesh, quantization),
        tokenizer,
        hf_config=hf_config,
        generation_config=generation_config,
        name=path_or_hub_id,
    )


def save_pretrained(
    lm: LanguageModel,
    folder: str | os.PathLike,
    dtype: str | None = None,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a folder for transformers: weights with any adapter merged, configs, tokenizer.

    Transformers 4 and 5 read it. The tokenizer's files are copied where it was not changed, see
    `hub_files.save_tokenizer`.
    Where the parameters span processes, all of them call this, and the first one writes.

    Args:
      lm: the model; quantised kernels are written expanded.
      folder: destination, created if missing.
      dtype: type of the written weights; None for the model's own.
      shard_bytes: size of the largest file; more weights are split, with an index.

    Example:
      >>> import pathlib, tempfile
      >>> lm = load_pretrained("package:model")
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_pretrained(lm, folder, dtype="bfloat16")
      ...     sorted(path.name for path in pathlib.Path(folder).glob("*.json"))
      ...     load_pretrained(folder).generate(["Hello!"]) == lm.generate(["Hello!"])
      ['config.json', 'generation_config.json', 'tokenizer.json', 'tokenizer_config.json']
      True
    """
    folder, dtype = pathlib.Path(folder), dtype or lm.config.dtype
    _check_dtype(dtype)
    if writes(lm.params):
        folder.mkdir(parents=True, exist_ok=True)
    update = None if lm.adapter is None else lora.update_of(lm.adapter)
    hub.save_params(
        lm.params, lm.config, folder, dtype=dtype, update=update, shard_bytes=shard_bytes
    )
    if not writes(lm.params):
        return
    # A head of its own, whatever the base's file says: transformers 4 would tie it again.
    untied = {} if lm.config.tie_embeddings else {"tie_word_embeddings": False}
    hf_config = lm.hf_config | untied
    hub.write_json(folder / "config.json", hub_files.config_for_all(hf_config, dtype))
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    own = {name: getattr(lm.tokenizer, name) for name in ids}
    generation_config = lm.generation_config or own
    if set(lm.stop_ids) != set(end_tokens(generation_config)):
        # What ends an answer here ends it in other programs too.
        ids = list(lm.stop_ids)
        generation_config = generation_config | {"eos_token_id": ids if len(ids) > 1 else ids[0]}
    hub.write_json(folder / "generation_config.json", generation_config)
    hub_files.save_tokenizer(lm.tokenizer, folder)
