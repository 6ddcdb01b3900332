"""Where a suffix stands in a prompt, which tokens it may have, and which suffixes survive as text.

A search works on tokens, but an attacker sends text. A suffix counts only where the text of its
prompt becomes the very tokens that were scored.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fedsafe_jax.attacks.contract import AttackError, reworded
from fedsafe_jax.data import chat_template, control_tokens
from fedsafe_jax.data.examples import Example
from fedsafe_jax.data.merged_turns import accepted_form

STARTS = (" !", " x", " a", "!")  # what a suffix begins as, repeated; the first one that fits
CONTEXT = 4  # tokens before a suffix with which it is decoded: some tokenizers drop a first blank


class Place(NamedTuple):
    """Where a suffix stands in the prompt of a request.

    Attributes:
      before, after: rendered text around it.
      ids_before, ids_after: their token ids.
      start: token ids that the search begins with.
    """

    before: str
    after: str
    ids_before: list[int]
    ids_after: list[int]
    start: list[int]


def place(tokenizer: Any, request: Example, length: int) -> Place:
    """Finds the place behind the last turn of the user.

    Args:
      tokenizer: a fast Hugging Face tokenizer with a chat template.
      request: a dialogue.
      length: tokens of the suffix.

    Raises:
      AttackError: no text of so many tokens stands apart from what is around it, or the template
        writes the request twice.
      ChatTemplateError: the template refuses the turns.
    """
    chat = chat_template.of(tokenizer)
    turns = [
        (role, control_tokens.break_up(text, chat.control, thoughts=role == "assistant"))
        for role, text in request.messages
    ]
    asked = [text for role, text in turns if role == "user"][-1]
    turns = reworded(tuple(turns), asked + control_tokens.MARK)
    _, text, _ = accepted_form(chat, turns, generation_prompt=True)
    if text.count(control_tokens.MARK) != 1:
        raise AttackError(f"{chat.name} writes a request more than once, or changes it.")
    before, after = text.split(control_tokens.MARK)
    for unit in STARTS:
        for count in range(1, length + 1):
            split = _split(chat, before, unit * count, after)
            if split is None or len(split[1]) > length:
                break
            if len(split[1]) == length:
                return Place(before, after, ids_before=split[0], ids_after=split[2], start=split[1])
    raise AttackError(
        f"{chat.name}: no plain text of {length} tokens stands apart behind {asked[-40:]!r}; "
        "try another length of the suffix."
    )


def _split(
    chat: chat_template.ChatTemplate, before: str, suffix: str, after: str
) -> tuple[list[int], list[int], list[int]] | None:
    """Tokenises a prompt in its three parts; None where a token lies across their borders."""
    ids, spans = chat.tokenise(before + suffix + after)
    first, last = len(before), len(before) + len(suffix)
    inside = [i for i, (start, end) in enumerate(spans) if end > first and start < last]
    if not inside or spans[inside[0]][0] < first or spans[inside[-1]][1] > last:
        return None
    begin, stop = inside[0], inside[-1] + 1
    return ids[:begin], ids[begin:stop], ids[stop:]


def allowed_tokens(tokenizer: Any, vocab_size: int) -> np.ndarray:
    """Returns which tokens a suffix may have, bool `[vocab_size]`.

    Control and added tokens are none of them: a message that holds their names is broken up. Text
    is printable ASCII, as GCG searches it by default.
    """
    added = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    allowed = np.zeros(vocab_size, bool)
    for i in range(min(vocab_size, len(tokenizer))):
        if i not in added:
            text = tokenizer.decode([i], clean_up_tokenization_spaces=False)
            allowed[i] = bool(text.strip()) and text.isascii() and text.isprintable()
    return allowed


def as_text(tokenizer: Any, place: Place, ids: Sequence[int]) -> str | None:
    """Returns the text of a suffix; None where the prompt with it has other tokens.

    A suffix that ends in a blank is none: many templates strip it from a message.

    Args:
      tokenizer: the tokenizer.
      place: where the suffix stands.
      ids: its token ids.
    """
    context = place.ids_before[-CONTEXT:]
    known, whole = (
        tokenizer.decode(x, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for x in (context, [*context, *ids])
    )
    text = whole[len(known) :]
    if not whole.startswith(known) or not text or text != text.rstrip():
        return None
    again, _ = chat_template.of(tokenizer).tokenise(place.before + text + place.after)
    return text if again == [*place.ids_before, *ids, *place.ids_after] else None
