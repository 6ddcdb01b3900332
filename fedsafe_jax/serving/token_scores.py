"""Log-probabilities of given tokens, with the likeliest tokens at each place."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedsafe_jax.data import packing
from fedsafe_jax.data.chat import Encoded
from fedsafe_jax.inference.language_model import LanguageModel
from fedsafe_jax.models.sharding import fetch

TOPS = (1, 5, 20)  # numbers of likeliest tokens that programs are compiled for
LEAST_ROW = 128  # tokens of a row that short texts are packed into
MOST_TOKENS = 16384  # of the rows that are scored at once
CHUNK = 128  # tokens whose logits are held at once


class TokenScores(NamedTuple):
    """Scores of one sequence of n tokens.

    Attributes:
      log_probs: float32 `[n - 1]`, of the tokens behind the first, each given those before it.
      top_ids, top_log_probs: int32 and float32 `[n, top]`, the likeliest tokens behind each token;
        the last row is of the token that would follow the sequence.
    """

    log_probs: np.ndarray
    top_ids: np.ndarray
    top_log_probs: np.ndarray


@functools.partial(jax.jit, static_argnames=("model", "top"))
def _scores(model, top, params, factors, batch):
    """Returns log-probabilities `[rows, seq]` and the likeliest tokens `[rows, seq, top]`."""
    variables = {"params": params} | ({"lora": factors} if factors is not None else {})
    hidden, _ = model.apply(variables, batch.tokens, batch.positions, batch.segment_ids)

    def of_chunk(inputs):
        part, targets = inputs
        logits = model.apply({"params": params}, part, method="unembed")
        # One array for both: clients compare a token's with the likeliest one's for equality.
        log_probs = jax.nn.log_softmax(logits)
        own = jnp.take_along_axis(log_probs, targets[:, None], axis=-1)[:, 0]
        return own, *jax.lax.top_k(log_probs, top)

    # A row is a power of two from 128 on, so chunks come out even.
    flat = hidden.reshape(-1, CHUNK, hidden.shape[-1]), batch.targets.reshape(-1, CHUNK)
    own, likeliest, ids = jax.lax.map(of_chunk, flat)
    shape = batch.tokens.shape
    return own.reshape(shape), likeliest.reshape(*shape, top), ids.reshape(*shape, top)


def score_tokens(
    lm: LanguageModel, sequences: Sequence[Sequence[int]], top: int
) -> list[TokenScores]:
    """Scores every token of each sequence.

    Sequences are packed into rows whose number and length are powers of two, so that few shapes are
    compiled.

    Args:
      lm: the model, under its adapter.
      sequences: token ids, at least one each.
      top: likeliest tokens at each place, at least 1.

    Returns:
      The scores in the sequences' order.
    """
    lm = lm.on_one_device()
    width = next((t for t in TOPS if t >= top), top)
    lengths = [len(ids) for ids in sequences]
    seq = max(LEAST_ROW, _power(max(lengths)))
    encoded = [Encoded(np.asarray(ids, np.int32), np.ones(len(ids), bool)) for ids in sequences]
    assigned = packing.assign_rows(lengths, seq)
    at_once = max(1, MOST_TOKENS // seq)
    scores: dict[int, TokenScores] = {}
    for start in range(0, len(assigned), at_once):
        rows = assigned[start : start + at_once]
        batch = packing.fill(encoded, rows, _power(len(rows)), seq)
        own, likeliest, ids = fetch(
            _scores(lm.model, width, lm.params, factors=lm.factors, batch=batch)
        )
        for r, members in enumerate(rows):
            begin = 0
            for index in members:
                end = begin + lengths[index]
                scores[index] = TokenScores(
                    own[r, begin : end - 1], ids[r, begin:end, :top], likeliest[r, begin:end, :top]
                )
                begin = end
    return [scores[i] for i in range(len(sequences))]


def _power(count: int) -> int:
    return 1 << (count - 1).bit_length()
