"""Log-likelihoods of given answers: the basis of HHH accuracy and of held-out loss."""

import functools
from collections.abc import Sequence

import jax
import numpy as np

from fedsafe_jax.data import packing
from fedsafe_jax.data.chat import Encoded
from fedsafe_jax.inference.language_model import LanguageModel
from fedsafe_jax.models.loss import token_nll
from fedsafe_jax.models.sharding import fetch

BATCH_ROWS = 16  # packed rows scored at once


@functools.partial(jax.jit, static_argnames=("model",))
def _score(model, params, factors, batch):
    """Returns the negative log-likelihood of each target token, float32 `[rows, seq]`."""
    variables = {"params": params} | ({"lora": factors} if factors is not None else {})
    hidden, _ = model.apply(variables, batch.tokens, batch.positions, batch.segment_ids)
    return token_nll(model, params, hidden, batch.targets, batch.mask)


def score_examples(
    lm: LanguageModel, encoded: Sequence[Encoded], seq: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sums the log-likelihood of the target tokens of each encoded dialogue.

    Args:
      lm: the model, under its adapter.
      encoded: dialogues of at most `seq` tokens.
      seq: tokens of a packed row.

    Returns:
      `(log_likelihood float64 [n] in nats, target tokens int [n])`.
    """
    lm = lm.on_one_device()
    assigned = packing.assign_rows([len(e.ids) for e in encoded], seq)
    totals, counts = np.zeros(len(encoded)), np.zeros(len(encoded), int)
    for start in range(0, len(assigned), BATCH_ROWS):
        rows = assigned[start : start + BATCH_ROWS]
        batch = packing.fill(encoded, rows, BATCH_ROWS, seq)
        nll = fetch(_score(lm.model, lm.params, lm.factors, batch))
        for r, members in enumerate(rows):
            for segment, index in enumerate(members, 1):
                inside = batch.segment_ids[r] == segment
                totals[index] = -nll[r, inside].sum(dtype=np.float64)
                counts[index] = int(batch.mask[r, inside].sum())
    return totals, counts
