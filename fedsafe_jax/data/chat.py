"""Dialogues to token ids: which tokens are targets is found in the rendered text.

What is learned is the assistant's words and the end token behind them. A training text begins with
what evaluation asks the model with, and goes on with the answer: see `answer_places`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedsafe_jax.data import chat_template, shortening
from fedsafe_jax.data.answer_places import (
    behind_blanks,
    control_behind,
    locate,
    locate_earlier,
)
from fedsafe_jax.data.chat_template import ChatTemplate, ChatTemplateError
from fedsafe_jax.data.control_tokens import BREAK, break_up
from fedsafe_jax.data.dialogue_notes import CONTROL, CUT, MERGED
from fedsafe_jax.data.examples import Messages
from fedsafe_jax.data.merged_turns import Turns, accepted_form
from fedsafe_jax.data.refusals import spoken

UNCUT = 1 << 20  # tokens beyond any dialogue


class Encoded(NamedTuple):
    """One tokenised dialogue."""

    ids: np.ndarray  # int32 [length]
    loss_mask: np.ndarray  # bool [length]: the token is a training target
    notes: tuple[str, ...] = ()  # what had to be done to it: MERGED, CONTROL, CUT
    target: int | None = None  # the token that all targets learn; None for the text's own


class Prompt(NamedTuple):
    """A dialogue up to where the answer comes."""

    ids: list[int]
    notes: tuple[str, ...] = ()  # as in `Encoded`


def to_dicts(messages: Sequence[tuple[str, str]]) -> list[dict]:
    """Returns (role, text) turns in the form that chat templates take."""
    return [{"role": role, "content": text} for role, text in messages]


def render(
    tokenizer: Any, messages: Sequence[tuple[str, str]], add_generation_prompt: bool
) -> list[int]:
    """Returns the token ids of a dialogue.

    Args:
      tokenizer: a fast Hugging Face tokenizer with a chat template.
      messages: (role, text) turns.
      add_generation_prompt: whether the assistant's header follows.

    Raises:
      ChatTemplateError: the template refuses the turns, also when they are merged.
    """
    chat = chat_template.of(tokenizer)
    _, text, _ = accepted_form(chat, _broken_up(chat, messages), add_generation_prompt)
    return chat.tokenise(text)[0]


def prompt(
    tokenizer: Any, messages: Sequence[tuple[str, str]], max_length: int | None = None
) -> Prompt:
    """Returns a dialogue's token ids, with the assistant's header, and what was done to it.

    Args:
      tokenizer: a fast Hugging Face tokenizer with a chat template.
      messages: (role, text) turns.
      max_length: most tokens; longer dialogues are cut where it hurts least, see
        `shortening.shorten`. None for no limit. Where the template alone is longer, so is the
        prompt.

    Raises:
      ChatTemplateError: the template refuses the turns, also when they are merged.
    """
    chat = chat_template.of(tokenizer)
    turns = _broken_up(chat, messages)
    notes = (CONTROL,) if any(BREAK in text for _, text in turns) else ()
    _, text, merged = accepted_form(chat, turns, generation_prompt=True)
    if merged is not None:
        notes += (MERGED,)
    ids, _ = chat.tokenise(text)
    if max_length is None or len(ids) <= max_length:
        return Prompt(ids, notes)
    shorter = shortening.shorten(turns, _fits(chat, max_length))
    if shorter is None:
        return Prompt(ids, notes)
    _, text, _ = accepted_form(chat, shorter[0], generation_prompt=True)
    return Prompt(chat.tokenise(text)[0], (*notes, CUT))


def encode(
    tokenizer: Any,
    messages: Sequence[tuple[str, str]],
    response: str,
    max_length: int,
    train_on_turns: Sequence[int] = (),
) -> Encoded | None:
    """Tokenises a dialogue with its answer; only the assistant's words are training targets.

    Args:
      tokenizer: a fast Hugging Face tokenizer with a chat template.
      messages: turns up to and including the last user turn.
      response: the answer; a target, with its end token. A thought before it is left out where the
        model answers without one.
      max_length: most tokens. Longer dialogues are cut where it hurts least, see
        `shortening.shorten`; of an answer that alone fills three quarters the end is cut.
      train_on_turns: indices of earlier assistant turns that are targets too.

    Returns:
      The encoding, or None where no target is left within `max_length`.

    Raises:
      ChatTemplateError: the template refuses the turns, loses the answer, or writes no end token,
        so that nothing would teach the model to stop.
    """
    return _encode(
        tokenizer, messages, response, max_length=max_length, learned=set(train_on_turns)
    )


def encode_behind(
    tokenizer: Any,
    messages: Sequence[tuple[str, str]],
    response: str,
    max_length: int,
    unlearned: int,
) -> Encoded | None:
    """Tokenises a dialogue with its answer, as `encode`; the answer's beginning is not learned.

    Args:
      tokenizer, messages, response, max_length: as in `encode`.
      unlearned: characters at the answer's beginning that are no targets.

    Returns:
      As `encode`.

    Raises:
      ChatTemplateError: as `encode`.
    """
    return _encode(
        tokenizer,
        messages,
        response,
        max_length=max_length,
        learned=set(),
        unlearned=unlearned,
    )


def without_end(tokenizer: Any, encoded: Encoded) -> Encoded:
    """Returns an encoding whose answer's end token is no target: its answer was cut.

    Args:
      tokenizer: the tokenizer that encoded it.
      encoded: a dialogue with its answer.
    """
    ends = np.isin(encoded.ids, chat_template.of(tokenizer).stop_ids) & encoded.loss_mask
    if not ends.any():
        return encoded
    mask = encoded.loss_mask.copy()
    mask[int(np.flatnonzero(ends)[-1]) :] = False
    return encoded._replace(loss_mask=mask)


def before_answers(
    tokenizer: Any, messages: Messages, answers: Sequence[str], max_length: int
) -> Messages:
    """Cuts a dialogue so that the longest of its answers ends within `max_length`.

    All answers stand behind the same dialogue, and none is cut. The dialogue keeps a quarter of
    `max_length`: an answer that leaves less ends beyond it.

    Args:
      tokenizer: a fast Hugging Face tokenizer with a chat template.
      messages: (role, text) turns up to the request.
      answers: answers to them.
      max_length: most tokens of the dialogue with an answer.

    Returns:
      The turns that are left, see `shortening.shorten`; `messages` itself where nothing had to be
      cut, or not even empty turns would do.

    Raises:
      ChatTemplateError: as `encode`.
    """

    def longest(turns: Messages) -> tuple[int, int]:
        """Tokens of the dialogue with its longest answer, and of that answer alone."""
        encoded = (encode(tokenizer, turns, answer, UNCUT) for answer in answers)
        sizes = ((len(e.ids), int(e.loss_mask.sum())) for e in encoded if e is not None)
        return max(sizes, key=lambda size: size[0], default=(0, 0))

    whole, said = longest(messages)
    if whole <= max_length:
        return messages
    room = max(max_length, said + max_length // 4)
    shorter = shortening.shorten(messages, lambda turns: longest(turns)[0] <= room)
    return messages if shorter is None else tuple(shorter[0])


def _encode(
    tokenizer: Any,
    messages: Sequence[tuple[str, str]],
    response: str,
    max_length: int,
    *,
    learned: set[int],
    unlearned: int = 0,
) -> Encoded | None:
    """Tokenises a dialogue, shorter where it is too long; see `encode` and `encode_behind`."""
    chat = chat_template.of(tokenizer)
    turns = _broken_up(chat, messages)
    answer = spoken(response) if chat.closes_thoughts else response
    if response and not answer:  # a thought that never ends
        return None
    unlearned = max(0, unlearned - (len(response) - len(answer)))
    if unlearned:  # the place is counted in the text as it is rendered
        unlearned = len(break_up(answer[:unlearned], chat.control, thoughts=True))
    answer = break_up(answer, chat.control, thoughts=True)
    notes = (CONTROL,) if any(BREAK in text for text in (answer, *(t for _, t in turns))) else ()
    whole = _encode_whole(chat, turns, answer, learned=learned, unlearned=unlearned)
    if len(whole.ids) > max_length:
        room = max(max_length - (len(whole.ids) - whole.begin), max_length // 4)
        shorter = shortening.shorten(turns, _fits(chat, room))
        if shorter is not None:
            turns, places = shorter
            learned = {places.index(i) for i in learned if i in places}
            whole = _encode_whole(chat, turns, answer, learned=learned, unlearned=unlearned)
        notes += (CUT,)
    if whole.merged:
        notes += (MERGED,)
    ids, mask = np.asarray(whole.ids[:max_length], np.int32), whole.loss_mask[:max_length]
    return Encoded(ids, mask, notes) if mask.any() else None


class _Whole(NamedTuple):
    """A dialogue with its answer, however long."""

    ids: list[int]
    loss_mask: np.ndarray  # bool [length]
    begin: int  # the answer's first token
    merged: bool


def _broken_up(chat: ChatTemplate, messages: Sequence[tuple[str, str]]) -> Turns:
    """Returns turns whose control tokens are broken up; an answer may hold its thought's marks."""
    return [
        (role, break_up(text, chat.control, thoughts=role == "assistant"))
        for role, text in messages
    ]


def _fits(chat: ChatTemplate, room: int) -> Callable[[Sequence[tuple[str, str]]], bool]:
    @functools.lru_cache(maxsize=8)  # the same turns are asked about more than once
    def fits(turns: tuple[tuple[str, str], ...]) -> bool:
        _, text, _ = accepted_form(chat, turns, generation_prompt=True)
        return len(chat.tokenise(text)[0]) <= room

    return lambda turns: fits(tuple(turns))


def _encode_whole(
    chat: ChatTemplate, turns: Turns, answer: str, learned: set[int], unlearned: int
) -> _Whole:
    """Encodes a dialogue whatever its length; arguments as in `encode`."""
    accepted, text, places = accepted_form(chat, [*turns, ("assistant", answer)], False)
    at = locate(chat, accepted, text)
    ids, spans = chat.tokenise(at.text)
    ends = np.array([end for _, end in spans])
    mask = np.zeros(len(ids), bool)
    begin = int(np.argmax(ends > at.start))
    stop = control_behind(chat, ids, ends, at.end, chat.stop_ids)
    if stop is None:
        raise ChatTemplateError(
            f"{chat.name} writes no end token behind an answer: nothing would teach the model to "
            "stop. Give a chat_template that writes {{ eos_token }} there."
        )
    first = int(np.argmax(ends > (at.words + unlearned if unlearned else at.start)))
    mask[first : behind_blanks(at.text, ends, stop)] = True
    for index in learned:
        place = index if places is None else places[index]
        start, end = locate_earlier(chat, accepted, place, at.text)
        first = int(np.argmax(ends > start))
        stop = control_behind(chat, ids, ends, end)
        if stop is not None and ids[stop] in chat.stop_ids:
            mask[first : behind_blanks(at.text, ends, stop)] = True
        else:  # an end token for the last answer alone
            mask[first : int((ends <= end).sum())] = True
    return _Whole(ids, mask, begin, places is not None)
