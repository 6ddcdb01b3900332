"""Where the answers of a dialogue stand in its rendered text, and which tokens end them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedsafe_jax.data.chat_template import ChatTemplate, ChatTemplateError
from fedsafe_jax.data.control_tokens import MARK
from fedsafe_jax.data.merged_turns import Turns
from fedsafe_jax.data.refusals import spoken


class Place(NamedTuple):
    """Where an answer stands in a rendered dialogue, in characters."""

    text: str
    start: int  # behind what evaluation asks with
    words: int  # where the words begin
    end: int  # behind the words


def locate(chat: ChatTemplate, turns: Turns, text: str) -> Place:
    """Finds the last turn, the answer, in a rendered dialogue.

    Where the text does not begin with what evaluation asks with, such as a header or a thought
    that is opened there alone, the answer is put behind that instead.

    Args:
      chat: the tokenizer's chat template.
      turns: turns as the template takes them, the answer last.
      text: the same, rendered.

    Raises:
      ChatTemplateError: the template changes or loses the answer.
    """
    asked = chat.write(turns[:-1], generation_prompt=True)
    words = turns[-1][1].strip()
    if text.startswith(asked):
        behind = text[len(asked) :].lstrip()
        if behind.startswith(words):
            start = len(text) - len(behind)
            return Place(text, len(asked), start, start + len(words))
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
    return Place(before + body + after, len(before), start, start + len(body.strip()))


def locate_earlier(chat: ChatTemplate, turns: Turns, place: int, text: str) -> tuple[int, int]:
    """Returns where an earlier answer's words begin and end in the text.

    Args:
      chat: the tokenizer's chat template.
      turns: turns as the template takes them.
      place: index of the answer's turn.
      text: the text that `locate` made of them.

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


def control_behind(
    chat: ChatTemplate, ids: list[int], ends: np.ndarray, place: int, among: Sequence[int] = ()
) -> int | None:
    """Returns the index of the first control token behind a character; None for none.

    Args:
      chat: the tokenizer's chat template.
      ids: token ids of the text.
      ends: int `[tokens]`, the character behind each token.
      place: index of the character.
      among: the tokens that count; none for all control tokens.
    """
    for i in range(int((ends <= place).sum()), len(ids)):
        if ids[i] in among or not among and chat.is_control(ids[i]):
            return i
    return None


def behind_blanks(text: str, ends: np.ndarray, index: int) -> int:
    """Returns the index behind a token and the white space that follows it in the text.

    Args:
      text: the text.
      ends: int `[tokens]`, the character behind each token.
      index: index of the token.
    """
    rest = text[ends[index] :]
    blank = ends[index] + len(rest) - len(rest.lstrip())
    return int((ends <= blank).sum())
