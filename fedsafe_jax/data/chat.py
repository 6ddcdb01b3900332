"""Dialogues to token ids: the tokenizer's own chat template, and which tokens are targets."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Encoded(NamedTuple):
    """One tokenised dialogue."""

    ids: np.ndarray  # int32 [length]
    loss_mask: np.ndarray  # bool [length]: the token is a training target


def to_dicts(messages: Sequence[tuple[str, str]]) -> list[dict]:
    """Returns (role, text) turns in the form that chat templates take."""
    return [{"role": role, "content": text} for role, text in messages]


def render(
    tokenizer: Any, messages: Sequence[tuple[str, str]], add_generation_prompt: bool
) -> list[int]:
    """Returns the token ids of a dialogue.

    Args:
      tokenizer: a Hugging Face tokenizer with a chat template.
      messages: (role, text) turns.
      add_generation_prompt: whether the assistant's header follows.
    """
    text = tokenizer.apply_chat_template(
        to_dicts(messages), tokenize=False, add_generation_prompt=add_generation_prompt
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode(
    tokenizer: Any,
    messages: Sequence[tuple[str, str]],
    response: str,
    max_length: int,
    train_on_turns: Sequence[int] = (),
) -> Encoded | None:
    """Tokenises a dialogue with its answer; only the assistant's words are training targets.

    Args:
      tokenizer: a Hugging Face tokenizer with a chat template.
      messages: turns up to and including the last user turn.
      response: the answer; a target, with its end-of-turn token.
      max_length: most tokens; longer dialogues are cut at the end.
      train_on_turns: indices of earlier assistant turns that are targets too.

    Returns:
      The encoding, or None where no target is left within `max_length`.
    """
    turns = [*messages, ("assistant", response)]
    whole = render(tokenizer, turns, add_generation_prompt=False)
    loss_mask = np.zeros(len(whole), bool)
    for index in (*train_on_turns, len(turns) - 1):
        start = len(render(tokenizer, turns[:index], add_generation_prompt=True))
        last = index == len(turns) - 1
        end = (
            len(whole)
            if last
            else len(render(tokenizer, turns[: index + 1], add_generation_prompt=False))
        )
        loss_mask[start:end] = True
    ids = np.asarray(whole[:max_length], np.int32)
    loss_mask = loss_mask[:max_length]
    return Encoded(ids, loss_mask) if loss_mask.any() else None
