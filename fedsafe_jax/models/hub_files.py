"""Tokenizer and configs beside the weights, such that transformers 4 and 5 both read them.

A tokenizer that was not changed keeps its files to the byte: what writes them anew may name
classes that other versions do not know. vLLM and other servers still build on transformers 4.
"""

import json
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from fedsafe_jax import whole_files
from fedsafe_jax.models.decoder_config import ModelError
from fedsafe_jax.models.model_files import read_json, write_json
from fedsafe_jax.models.tokenizer_loading import read_tokenizer

TOKENIZER_CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
TOKENIZER_FILES = (
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "tekken.json",
)
TEMPLATE_FILES = (TEMPLATE, "additional_chat_templates/*.jinja")
SPECIAL_IDS = tuple(f"{name}_token_id" for name in "bos eos pad unk cls sep mask".split())
# Whatever `tokenizer.json` says, by the name of transformers 5 alone, and by that of both.
NEW_CLASS, FAST_CLASS = "TokenizersBackend", "PreTrainedTokenizerFast"
# Notes of transformers 5 on how a tokenizer was loaded, which say nothing of the tokenizer.
LOADING_NOTES = ("backend", "is_local", "local_files_only")
# What changes a tokenizer besides the tokenizers library's own state.
ATTRIBUTES = (
    "special_tokens_map",
    "all_special_tokens",
    "model_max_length",
    "padding_side",
    "truncation_side",
)


def save_tokenizer(tokenizer: Any, folder: str | os.PathLike[str]) -> None:
    """Writes a tokenizer: the files it was loaded from, or new ones where it was changed.

    A changed chat template alone is written beside the copied files, as `chat_template.jinja` and
    in `tokenizer_config.json`, which older programs read. Of copied files only a
    `tokenizer_config.json` that transformers 4 cannot load is changed.

    Args:
      tokenizer: a Hugging Face tokenizer.
      folder: an existing folder.
    """
    folder = pathlib.Path(folder)
    source = pathlib.Path(getattr(tokenizer, "name_or_path", None) or "")
    fresh = _reloaded(source)
    if fresh is None or not _same(tokenizer, fresh):
        tokenizer.save_pretrained(folder)
        _mend(folder, tokenizer, written=True)
        return
    same_template = tokenizer.chat_template == fresh.chat_template
    _copy(source, folder, TOKENIZER_FILES + (TEMPLATE_FILES if same_template else ()))
    _mend(folder, tokenizer)
    if not same_template:
        with whole_files.replaced(folder / TEMPLATE) as new:
            new.write_text(tokenizer.chat_template, encoding="utf-8")
        path = folder / TOKENIZER_CONFIG
        content = read_json(path) if path.is_file() else {"tokenizer_class": FAST_CLASS}
        write_json(path, content | {"chat_template": tokenizer.chat_template})


def check_vocabulary(
    tokenizer: Any, rows: int, where: str | os.PathLike[str], configs: Sequence[Mapping] = ()
) -> None:
    """Checks that the embedding has a row for every token that a text can become.

    Reading a row beyond the last one raises nothing in jax: it gives the last row. An embedding
    that is padded beyond the tokenizer is fine, and so is a special token that no text becomes, as
    it is not in the chat template (Gemma 3's tokenizer has one for images).

    Args:
      tokenizer: a Hugging Face tokenizer.
      rows: rows of the embedding.
      where: the model's folder, for the message.
      configs: contents of `config.json` and `generation_config.json`, for their special tokens.

    Raises:
      ModelError: the first token without a row, with both sizes.
    """
    ids = {token: i for token, i in tokenizer.get_vocab().items() if i >= rows}
    unreachable = unreachable_tokens(tokenizer)
    for token, i in sorted(ids.items(), key=lambda item: item[1]):
        if token not in unreachable:
            raise ModelError(
                f"{where}: token '{token}' of the tokenizer has id {i}, but the embedding has "
                f"{rows} rows ({len(tokenizer)} tokens); resize the embedding in transformers "
                "(resize_token_embeddings), or use the tokenizer that the model was trained with."
            )
    own = {name: getattr(tokenizer, name, None) for name in SPECIAL_IDS}
    for source in (own, *configs):
        for name in SPECIAL_IDS:
            given = source.get(name)
            for i in given if isinstance(given, list) else [given]:
                if isinstance(i, int) and i >= rows:
                    raise ModelError(
                        f"{where}: {name} is {i}, but the embedding has {rows} rows: the "
                        "tokenizer and the model do not belong together."
                    )


def unreachable_tokens(tokenizer: Any) -> set[str]:
    """Returns the special tokens that the chat template does not write; none without a template.

    No text becomes one of them: control tokens in users' words are no control tokens here.
    """
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return set()
    template = str(template)
    named = {getattr(tokenizer, name.removesuffix("_id"), None) for name in SPECIAL_IDS}
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    special = {token.content for token in added if token.special}
    return {token for token in special if token not in template} - named


def _reloaded(source: pathlib.Path) -> Any:
    """The tokenizer of a folder as it is on disk; None where there is none any more."""
    if not any((source / name).is_file() for name in ("tokenizer.json", TOKENIZER_CONFIG)):
        return None
    try:
        return read_tokenizer(source)
    except ModelError:
        return None


def _same(one: Any, other: Any) -> bool:
    """Whether two tokenizers make the same tokens of a text, chat templates left aside."""
    if type(one) is not type(other):
        return False
    return _state(one) == _state(other) and all(
        getattr(one, name, None) == getattr(other, name, None) for name in ATTRIBUTES
    )


def _state(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer.get_vocab()
    # Every call leaves its truncation and padding behind in the library's state.
    return json.loads(backend.to_str()) | {"truncation": None, "padding": None}


def _copy(source: pathlib.Path, folder: pathlib.Path, patterns: tuple[str, ...]) -> None:
    """Copies the files of the patterns that are there; links of the Hub's cache become files."""
    for pattern in patterns:
        for path in source.glob(pattern):
            target = folder / path.relative_to(source)
            if path.resolve() != target.resolve():
                target.parent.mkdir(parents=True, exist_ok=True)
                with whole_files.replaced(target) as new:
                    shutil.copyfile(path, new)


def _mend(folder: pathlib.Path, tokenizer: Any, written: bool = False) -> None:
    """Makes a `tokenizer_config.json` of transformers 5 readable for transformers 4.

    Args:
      folder: folder of the file.
      tokenizer: the tokenizer of the file.
      written: whether the file was just written, not copied; its class is then of no use, as
        `tokenizer.json` says everything.
    """
    path = folder / TOKENIZER_CONFIG
    if not path.is_file():
        return
    content = read_json(path)
    extra = content.get("extra_special_tokens")
    written = written and (folder / "tokenizer.json").is_file()
    new = content.get("tokenizer_class") == NEW_CLASS
    if not (written or new or isinstance(extra, list)):
        return
    if written or new:
        content["tokenizer_class"] = FAST_CLASS
        # In transformers 4 this class adds token types otherwise, which `generate` refuses.
        content["model_input_names"] = list(tokenizer.model_input_names)
    if isinstance(extra, list):  # transformers 4 expects a dict under this name
        content["additional_special_tokens"] = content.pop("extra_special_tokens")
    write_json(path, {k: v for k, v in content.items() if k not in LOADING_NOTES})


def config_for_all(raw: dict, dtype: str) -> dict:
    """Returns a `config.json` in both spellings: of transformers 4 and of 5.

    Args:
      raw: the content of the base's `config.json`, in either spelling.
      dtype: type of the weights beside it.
    """
    config = {k: v for k, v in raw.items() if k != "_name_or_path"}
    config |= {"dtype": dtype, "torch_dtype": dtype}
    rope = config.get("rope_parameters") or {}
    if local := rope.get("sliding_attention"):  # Gemma 3: windowed layers have a base of their own
        config.setdefault("rope_local_base_freq", local["rope_theta"])
        rope = rope["full_attention"]
    if "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
    scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
    if scaling.get("rope_type", "default") != "default":
        config.setdefault("rope_scaling", scaling)
    return config
