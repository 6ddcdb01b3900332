"""HHH: how often the better of two answers is the likelier one, by category."""

from collections.abc import Sequence

from fedsafe_jax.data import chat, sources
from fedsafe_jax.data.examples import Choice
from fedsafe_jax.data.readers import field, parse_dialogue
from fedsafe_jax.evals import scoring


def run(lm, choices: Sequence[Choice], max_length: int) -> list[bool]:
    """Whether the better answer has the higher mean log-likelihood a token, one bool a choice.

    Dialogues beyond `max_length` tokens lose their beginning, which both answers share.
    """
    encoded = []
    for choice in choices:
        for answer in (choice.better, choice.worse):
            example = chat.encode(lm.tokenizer, choice.messages, answer, 1 << 20)
            encoded.append(chat.Encoded(example.ids[-max_length:], example.loss_mask[-max_length:]))
    lm = lm.on_one_device()
    totals, counts = scoring.score_examples(
        lm.model, lm.params, lm.factors, encoded=encoded, seq=max_length
    )
    mean = totals / counts.clip(1)
    return [bool(better > worse) for better, worse in zip(mean[::2], mean[1::2], strict=True)]


def load_choices(location: str, data_dir: str) -> list[Choice]:
    """The HHH comparisons: the 438-item file, or rows with a `category` as in BIG-bench.

    The 438-item file names no category; its items are grouped by `single turn` and `multi turn`.
    """
    choices = []
    for place, row in sources.read_rows(location, data_dir):
        better = parse_dialogue(field(place, row, "text_correct"))
        worse = parse_dialogue(field(place, row, "text_incorrect"))
        turns = sum(role == "user" for role, _ in better)
        category = row.get("category") or ("single turn" if turns == 1 else "multi turn")
        choices.append(Choice(better[:-1], better[-1][1], worse[-1][1], category))
    return choices
