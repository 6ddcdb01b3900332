"""Dialogues to token ids: the tokenizer's own chat template, and which tokens are learned."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Encoded(NamedTuple):
    """One tokenised dialogue."""

    ids: np.ndarray  # int32 [length]
    loss_mask: np.ndarray  # bool [length]: the token is a training target


def to_dicts(messages: Sequence[tuple[str, str]]) -> list[dict]:
    """(role, text) turns in the form that chat templates take."""
    return [{"role": role, "content": text} for role, text in messages]


def render(
    tokenizer, messages: Sequence[tuple[str, str]], add_generation_prompt: bool
) -> list[int]:
    """Returns the token ids of a dialogue, with the assistant's header after it where
    `add_generation_prompt`."""
    text = tokenizer.apply_chat_template(
        to_dicts(messages), tokenize=False, add_generation_prompt=add_generation_prompt
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode(
    tokenizer,
    messages: Sequence[tuple[str, str]],
    response: str,
    max_length: int,
    train_on_turns: Sequence[int] = (),
) -> Encoded | None:
    """Tokenises a dialogue with its answer; only the assistant's words are learned.

    Args:
      tokenizer: a Hugging Face tokenizer with a chat template.
      messages: turns up to and including the last user turn.
      response: the answer; learned, with its end-of-turn token.
      max_length: longer dialogues are cut at the end.
      train_on_turns: indices of earlier assistant turns that are learned too.

    Returns:
      The encoding, or None when no learned token is left within `max_length`.
    """
    turns = [*messages, ("assistant", response)]
    whole = render(tokenizer, turns, add_generation_prompt=False)
    learned = np.zeros(len(whole), bool)
    for index in (*train_on_turns, len(turns) - 1):
        start = len(render(tokenizer, turns[:index], add_generation_prompt=True))
        last = index == len(turns) - 1
        end = (
            len(whole)
            if last
            else len(render(tokenizer, turns[: index + 1], add_generation_prompt=False))
        )
        learned[start:end] = True
    ids = np.asarray(whole[:max_length], np.int32)
    learned = learned[:max_length]
    return Encoded(ids, learned) if learned.any() else None
