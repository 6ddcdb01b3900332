"""HHH: how often the better of two answers is the likelier one, by category."""

from collections.abc import Sequence

from fedsafe_jax.data import chat
from fedsafe_jax.data.sources import Choice
from fedsafe_jax.evals import scoring


def run(lm, choices: Sequence[Choice], max_length: int) -> list[bool]:
    """Whether the better answer has the higher mean log-likelihood a token, one bool a choice.

    Dialogues beyond `max_length` tokens lose their beginning, which both answers share.
    """
    encoded = []
    for choice in choices:
        for answer in (choice.better, choice.worse):
            example = chat.encode(lm.tokenizer, choice.messages, answer, 1 << 20)
            encoded.append(chat.Encoded(example.ids[-max_length:], example.learned[-max_length:]))
    lm = lm.on_one_device()
    totals, counts = scoring.score_examples(lm.model, lm.params, lm.adapter, encoded, max_length)
    mean = totals / counts.clip(1)
    return [bool(better > worse) for better, worse in zip(mean[::2], mean[1::2], strict=True)]
