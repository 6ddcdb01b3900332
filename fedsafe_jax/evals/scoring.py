"""Log-likelihoods of given answers: the basis of HHH accuracy and of held-out loss."""

import functools

import jax
import numpy as np

from fedsafe_jax.data import packing
from fedsafe_jax.models.loss import token_nll


@functools.partial(jax.jit, static_argnames=("model",))
def _score(model, params, adapter, batch):
    variables = {"params": params} | ({"lora": adapter} if adapter is not None else {})
    hidden, _ = model.apply(variables, batch.tokens, batch.positions, batch.segment_ids)
    return token_nll(model, params, hidden, batch.targets, batch.mask)


def score_examples(model, params, adapter, encoded, seq: int, batch_rows: int = 16):
    """Summed log-likelihood of the learned tokens of each encoded dialogue.

    Returns:
      `(log_likelihood float64 [n] in nats, learned tokens int [n])`.
    """
    assigned = packing.assign_rows([len(e.ids) for e in encoded], seq)
    totals, counts = np.zeros(len(encoded)), np.zeros(len(encoded), int)
    for start in range(0, len(assigned), batch_rows):
        rows = assigned[start : start + batch_rows]
        batch = packing.fill(encoded, rows, batch_rows, seq)
        nll = np.asarray(_score(model, params, adapter, batch))
        for r, members in enumerate(rows):
            for segment, index in enumerate(members, 1):
                inside = batch.segment_ids[r] == segment
                totals[index] = -nll[r, inside].sum(dtype=np.float64)
                counts[index] = int(batch.mask[r, inside].sum())
    return totals, counts
