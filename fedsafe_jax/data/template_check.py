"""Whether a chat template takes the dialogues that a model is going to be asked with."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from fedsafe_jax.data import chat
from fedsafe_jax.data.chat_template import ChatTemplateError
from fedsafe_jax.data.examples import Choice, Example, SourceError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check(tokenizer: "PreTrainedTokenizerBase", items: Iterable[tuple[str, Any]]) -> None:
    """Checks one dialogue of each order of roles, which is what templates refuse.

    Args:
      tokenizer: fast Hugging Face tokenizer with a chat template.
      items: where an item comes from, and the item; other items than examples and choices, such
        as those of a task of one's own, are not looked at.

    Raises:
      SourceError: the template refuses a dialogue, also with its turns merged.
    """
    seen = set()
    for place, item in items:
        if not isinstance(item, Example | Choice):
            continue
        messages = item.messages
        order = tuple(role for role, _ in messages)
        if order in seen:
            continue
        seen.add(order)
        try:
            chat.prompt(tokenizer, messages)
        except ChatTemplateError as error:
            last = messages[-1][1]
            raise SourceError(f"{place}, '{last[:60]}': {error}") from error
