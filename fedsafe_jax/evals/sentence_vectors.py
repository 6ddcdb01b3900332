"""Vectors of texts by a sentence encoder such as MiniLM: hidden states, averaged over the tokens.

It is what sentence-transformers does (Reimers and Gurevych, 2019, arXiv 1908.10084, section 3).
"""

import functools
import os
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedsafe_jax.filters import classifier, stream
from fedsafe_jax.filters.pair_rows import CHARACTERS_PER_TOKEN, Encoded, PairBatch, pad
from fedsafe_jax.models import encoder_hub
from fedsafe_jax.models.decoder_config import ModelError
from fedsafe_jax.models.encoder import Encoder, EncoderConfig
from fedsafe_jax.models.model_files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Files of sentence-transformers beside an encoder: its longest text, and how tokens are joined.
LENGTH, POOLING = "sentence_bert_config.json", "1_Pooling/config.json"


class SentenceEncoder(NamedTuple):
    """An encoder whose mean over the tokens is a text's vector.

    Attributes:
      config, params: shape and weights of `models.encoder.Encoder`.
      tokenizer: Hugging Face tokenizer.
      max_length: most tokens of a text, special tokens included; what is behind is not read.
    """

    config: EncoderConfig
    params: dict
    tokenizer: "PreTrainedTokenizerBase"
    max_length: int


def check(folder: str | os.PathLike) -> None:
    """Checks that a folder holds an encoder that averages over tokens; no weights are read.

    Raises:
      ModelError: no encoder, one of an unsupported kind, or one that joins tokens otherwise.
    """
    folder = pathlib.Path(folder)
    if not os.path.isfile(folder / "config.json"):
        raise ModelError(f"sentence encoder {folder}: no config.json there.")
    encoder_hub.read_config(folder)
    pooling = _read(folder / POOLING)
    if pooling and pooling.get("pooling_mode_mean_tokens") is not True:
        raise ModelError(
            f"{folder / POOLING}: pooling_mode_mean_tokens is not true; give an encoder that "
            "averages over its tokens, such as all-MiniLM-L6-v2."
        )


def load(folder: str | os.PathLike) -> SentenceEncoder:
    """Reads an encoder from a Hugging Face folder, with the files of sentence-transformers or not.

    Raises:
      ModelError: as `check`, or weights or tokenizer cannot be read.
    """
    check(folder)
    folder = pathlib.Path(folder)
    config, params = encoder_hub.load_classifier(folder)
    tokenizer = encoder_hub.load_tokenizer(folder, config)
    longest = _read(folder / LENGTH).get("max_seq_length") or config.max_length
    if not isinstance(longest, int) or longest < 1:
        raise ModelError(f"{folder / LENGTH}: max_seq_length={longest!r:.40}: expected 1 or more.")
    return SentenceEncoder(config, params["encoder"], tokenizer, min(longest, config.max_length))


def embed(encoder: SentenceEncoder, texts: Sequence[str]) -> np.ndarray:
    """Returns the vector of each text, float32 `[n, hidden_size]`, not normalised.

    Args:
      encoder: the encoder.
      texts: texts; of those longer than its `max_length` the beginning is read.
    """
    limit = CHARACTERS_PER_TOKEN * encoder.max_length
    ids = [
        encoder.tokenizer(text[:limit], truncation=True, max_length=encoder.max_length)["input_ids"]
        for text in texts
    ]
    rows = [Encoded(row, len(row)) for row in ids]
    out = np.zeros((len(rows), encoder.config.hidden_size), np.float32)
    for chosen, width, count in stream.batches(list(map(len, ids)), classifier.BATCH_TOKENS):
        batch = pad([rows[i] for i in chosen], min(width, encoder.config.max_length), count)
        vectors = _batch_vectors(encoder.config, encoder.params, batch)
        out[chosen] = np.asarray(vectors)[: len(chosen)]
    return out


@functools.partial(jax.jit, static_argnames="config")
def _batch_vectors(config: EncoderConfig, params: dict, batch: PairBatch) -> jax.Array:
    hidden = Encoder(config).apply({"params": params}, *batch)
    weight = batch.valid[:, :, None].astype(hidden.dtype)
    return (hidden * weight).sum(1) / jnp.maximum(weight.sum(1), 1.0)


def _read(path: pathlib.Path) -> dict:
    """Returns the content of a JSON file; {} where there is none."""
    return read_json(path) if os.path.isfile(path) else {}
