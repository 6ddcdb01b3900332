"""Dialogues to token ids: which tokens are targets is found in the rendered text.

What is learned is the assistant's words and the end token behind them. A training text begins with
what evaluation asks the model with, and goes on with the answer: see `_locate`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedsafe_jax.data import chat_template, shortening
from fedsafe_jax.data.chat_template import ChatTemplate, ChatTemplateError
from fedsafe_jax.data.control_tokens import BREAK, MARK, break_up
from fedsafe_jax.data.dialogue_notes import CONTROL, CUT, MERGED
from fedsafe_jax.data.examples import Messages
from fedsafe_jax.data.refusals import spoken

Turns = list[tuple[str, str]]

UNCUT = 1 << 20  # tokens beyond any dialogue

class Encoded(NamedTuple):
    """One tokenised dialogue."""

    ids: np.ndarray  # int32 [length]
    loss_mask: np.ndarray  # bool [length]: the token is a training target
    notes: tuple[str, ...] = ()  # what had to be done to it: MERGED, CONTROL, CUT


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
    _, text, _ = _accepted(chat, _broken_up(chat, messages), add_generation_prompt)
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
    _, text, merged = _accepted(chat, turns, generation_prompt=True)
    if merged is not None:
        notes += (MERGED,)
    ids, _ = chat.tokenise(text)
    if max_length is None or len(ids) <= max_length:
        return Prompt(ids, notes)
    shorter = shortening.shorten(turns, _fits(chat, max_length))
    if shorter is None:
        return Prompt(ids, notes)
    _, text, _ = _accepted(chat, shorter[0], generation_prompt=True)
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


class _Place(NamedTuple):
    """Where an answer stands in a rendered dialogue, in characters."""

    text: str
    start: int  # behind what evaluation asks with
    words: int  # where the words begin
    end: int  # behind the words


def _broken_up(chat: ChatTemplate, messages: Sequence[tuple[str, str]]) -> Turns:
    """Returns turns whose control tokens are broken up; an answer may hold its thought's marks."""
    return [
        (role, break_up(text, chat.control, thoughts=role == "assistant"))
        for role, text in messages
    ]


def _fits(chat: ChatTemplate, room: int) -> Callable[[Sequence[tuple[str, str]]], bool]:
    @functools.lru_cache(maxsize=8)  # the same turns are asked about more than once
    def fits(turns: tuple[tuple[str, str], ...]) -> bool:
        _, text, _ = _accepted(chat, turns, generation_prompt=True)
        return len(chat.tokenise(text)[0]) <= room

    return lambda turns: fits(tuple(turns))


def _accepted(
    chat: ChatTemplate, turns: Sequence[tuple[str, str]], generation_prompt: bool
) -> tuple[Turns, str, list[int] | None]:
    """Renders turns as they are, or merged where the template refuses or leaves out some.

    Turns of one role in a row become one, with a blank line between; only then does a system turn
    become part of the first request.

    Returns:
      `(turns, text, places)`; `places` are the new places of the turns, None where nothing was
      merged.

    Raises:
      ChatTemplateError: the template refuses the turns, also when they are merged.
    """
    turns = list(turns)
    tried: list[Turns] = []
    refusal = None
    for rename in (None, {}, {"system": "user"}):
        candidate, places = (turns, None) if rename is None else _merged(turns, rename)
        if candidate in tried:
            continue
        tried.append(candidate)
        try:
            text = chat.write(candidate, generation_prompt)
            _check_whole(chat, candidate, text)
        except ChatTemplateError as error:
            refusal = refusal or error
        else:
            return candidate, text, places
    raise refusal


def _merged(turns: Turns, rename: dict[str, str]) -> tuple[Turns, list[int]]:
    """Returns turns with those of one role in a row as one, and each turn's new place."""
    merged, places = [], []
    for role, text in turns:
        role = rename.get(role, role)
        if merged and merged[-1][0] == role and role != "tool":
            merged[-1] = (role, f"{merged[-1][1]}\n\n{text}")
        else:
            merged.append((role, text))
        places.append(len(merged) - 1)
    return merged, places


def _check_whole(chat: ChatTemplate, turns: Turns, text: str) -> None:
    """Checks that a template wrote what was said; of earlier answers it may drop the thought."""
    for role, content in turns:
        if role == "assistant":
            content = spoken(content)
        if role in ("system", "user", "assistant") and content.strip() not in text:
            raise ChatTemplateError(f"{chat.name} leaves out the words of the role {role}.")


def _encode_whole(
    chat: ChatTemplate, turns: Turns, answer: str, learned: set[int], unlearned: int
) -> _Whole:
    """Encodes a dialogue whatever its length; arguments as in `encode`."""
    accepted, text, places = _accepted(chat, [*turns, ("assistant", answer)], False)
    at = _locate(chat, accepted, text)
    ids, spans = chat.tokenise(at.text)
    ends = np.array([end for _, end in spans])
    mask = np.zeros(len(ids), bool)
    begin = int(np.argmax(ends > at.start))
    stop = _control_behind(chat, ids, ends, at.end, chat.stop_ids)
    if stop is None:
        raise ChatTemplateError(
            f"{chat.name} writes no end token behind an answer: nothing would teach the model to "
            "stop. Give a chat_template that writes {{ eos_token }} there."
        )
    first = int(np.argmax(ends > (at.words + unlearned if unlearned else at.start)))
    mask[first : _behind_blanks(at.text, ends, stop)] = True
    for index in learned:
        place = index if places is None else places[index]
        start, end = _earlier(chat, accepted, place, at.text)
        first = int(np.argmax(ends > start))
        stop = _control_behind(chat, ids, ends, end)
        if stop is not None and ids[stop] in chat.stop_ids:
            mask[first : _behind_blanks(at.text, ends, stop)] = True
        else:  # an end token for the last answer alone
            mask[first : int((ends <= end).sum())] = True
    return _Whole(ids, mask, begin, places is not None)


def _locate(chat: ChatTemplate, turns: Turns, text: str) -> _Place:
    """Finds the last turn, the answer, in a rendered dialogue.

    Where the text does not begin with what evaluation asks with, such as a header or a thought
    that is opened there alone, the answer is put behind that instead.

    Raises:
      ChatTemplateError: the template changes or loses the answer.
    """
    asked = chat.write(turns[:-1], generation_prompt=True)
    words = turns[-1][1].strip()
    if text.startswith(asked):
        behind = text[len(asked) :].lstrip()
        if behind.startswith(words):
            start = len(text) - len(behind)
            return _Place(text, len(asked), start, start + len(words))
    before, _, after = chat.write([*turns[:-1], ("assistant", MARK)]).rpartition(MARK)
    framed = before and text.startswith(before) and text.endswith(after)
    if framed and len(before) + len(after) <= len(text):
        body = text[len(before) : len(text) - len(after)]
        if not before.startswith(asked):
            before = asked
            if chat.opens_thought(asked):
                thought, closed, _ = words.partition("</think>")
                body = words.removeprefix("<think>") if closed else body
                before += "" if closed else "\n</think>\n\n"
    elif before and text.startswith(asked) and text.endswith(after):  # it has a thought of its own
        before, body = asked, text[len(asked) : len(text) - len(after)]
    else:
        before, body = "", ""
    if not before or spoken(words).strip() not in body:
        raise ChatTemplateError(f"{chat.name} changes or leaves out the answer.")
    start = len(before) + len(body) - len(body.lstrip())
    return _Place(before + body + after, len(before), start, start + len(body.strip()))


def _earlier(chat: ChatTemplate, turns: Turns, place: int, text: str) -> tuple[int, int]:
    """Returns where an earlier answer's words begin and end in the text.

    Raises:
      ChatTemplateError: they are not found.
    """
    marked = [*turns[:place], ("assistant", MARK), *turns[place + 1 :]]
    words = turns[place][1].strip()
    for before in (
        chat.write(marked).partition(MARK)[0],
        chat.write(marked[:-1], generation_prompt=True).partition(MARK)[0],
    ):
        behind = text[len(before) :]
        start = len(before) + len(behind) - len(behind.lstrip())
        for said in (words, spoken(words).strip()):
            if text.startswith(before) and text.startswith(said, start):
                return len(before), start + len(said)
    raise ChatTemplateError(f"{chat.name} changes or leaves out the answer of turn {place}.")


def _control_behind(
    chat: ChatTemplate, ids: list[int], ends: np.ndarray, place: int, among: Sequence[int] = ()
) -> int | None:
    """Returns the index of the first control token, or one of `among`, behind a character."""
    for i in range(int((ends <= place).sum()), len(ids)):
        if ids[i] in among or not among and chat.is_control(ids[i]):
            return i
    return None


def _behind_blanks(text: str, ends: np.ndarray, index: int) -> int:
    """Returns the index behind a token and the white space that follows it in the text."""
    rest = text[ends[index] :]
    blank = ends[index] + len(rest) - len(rest.lstrip())
    return int((ends <= blank).sum())
