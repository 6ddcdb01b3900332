"""Utility without a judge: the loss of held-out harmless answers."""

import numpy as np

from fedsafe_jax.data import chat
from fedsafe_jax.evals import scoring


def run(lm, examples, max_length: int) -> np.ndarray:
    """Negative log-likelihood a token, in nats, of each example's answer, float64 `[n]`."""
    encoded = [
        e
        for x in examples
        if (e := chat.encode(lm.tokenizer, x.messages, x.response, max_length)) is not None
    ]
    lm = lm.on_one_device()
    totals, counts = scoring.score_examples(
        lm.model, lm.params, lm.factors, encoded=encoded, seq=max_length
    )
    return -totals / counts.clip(1)
