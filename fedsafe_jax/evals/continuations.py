"""How an option stands behind what is asked, as token ids: three ways, as three upstreams do it.

Each is `(lm, context, options) -> an Encoded for each option`, whose targets are the option's
tokens; it is what `scoring.choices` takes.
"""

from collections.abc import Sequence

import numpy as np

from fedsafe_jax.data import chat
from fedsafe_jax.data.chat import UNCUT, Encoded
from fedsafe_jax.data.examples import Messages
from fedsafe_jax.inference.language_model import LanguageModel


def behind_dialogue(lm: LanguageModel, messages: Messages, options: Sequence[str]) -> list[Encoded]:
    """Encodes options as the assistant's answers to a dialogue, each with its end token.

    Args:
      lm: the model, for its tokenizer and chat template.
      messages: (role, text) turns up to the request.
      options: the answers; none is blank.

    Raises:
      ChatTemplateError: the template refuses the turns.
    """
    return [chat.encode(lm.tokenizer, messages, option, UNCUT) for option in options]


def as_one_text(lm: LanguageModel, context: str, options: Sequence[str]) -> list[Encoded]:
    """Encodes options as the ends of one plain text, without a chat template.

    This is lm-evaluation-harness 0.4 (`TemplateLM._encode_pair`): context and option are tokenised
    together, and what is beyond the tokens of the context alone is the option's. Blanks at the
    context's end go to the option. There are no special tokens, but for Gemma's beginning.

    Args:
      lm: the model, for its tokenizer.
      context: text before the options.
      options: ends of the text, mostly with a leading blank.
    """
    special = "gemma" in str(lm.hf_config.get("model_type", ""))
    stripped = context.rstrip()
    blanks = context[len(stripped) :]
    before = len(lm.tokenizer(stripped, add_special_tokens=special)["input_ids"])
    wholes = (
        lm.tokenizer(stripped + blanks + option, add_special_tokens=special)["input_ids"]
        for option in options
    )
    return [_targets_from(whole, before) for whole in wholes]


def as_tokens(lm: LanguageModel, context: str, options: Sequence[str]) -> list[Encoded]:
    """Encodes options as tokens of their own behind a plain text, without a chat template.

    This is SafetyBench's evaluation of base models (`code/evaluate_base.py`): the text has the
    tokenizer's special tokens, and the option's ids are those that it has alone.

    Args:
      lm: the model, for its tokenizer.
      context: text before the options.
      options: short texts, such as letters.
    """
    ids = lm.tokenizer(context)["input_ids"]
    alone = (lm.tokenizer(option, add_special_tokens=False)["input_ids"] for option in options)
    return [_targets_from([*ids, *option], len(ids)) for option in alone]


def _targets_from(ids: Sequence[int], start: int) -> Encoded:
    """Returns ids whose targets begin at `start`, at least one of them having a token before."""
    return Encoded(np.asarray(ids, np.int32), np.arange(len(ids)) >= max(start, 1))
