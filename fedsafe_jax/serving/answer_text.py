"""The text of an answer while its tokens come: whole characters, cut at a stop text."""

import bisect
from collections.abc import Callable, Sequence

LONGEST_CHARACTER = 16  # tokens after which a part of a character is taken as it is
TAIL = 8  # tokens of the prompt that are decoded along, since a token's text depends on its left
BROKEN = "\ufffd"  # what a part of a character is decoded as

Decode = Callable[[Sequence[int]], str]


class AnswerText:
    """The text of a growing answer.

    Args:
      decode: gives the text of token ids, without special tokens.
      prompt: token ids before the answer.
      stop: texts that end the answer and do not belong to it.
    """

    def __init__(self, decode: Decode, prompt: Sequence[int], stop: Sequence[str]):
        self._decode, self._tail, self._stop = decode, list(prompt[-TAIL:]), stop
        self._before = decode(self._tail)
        self.text, self.ids, self.is_stopped = "", [], False

    def grow(self, ids: Sequence[int], is_last: bool) -> str:
        """Takes the answer's tokens so far; returns the text that is new.

        What may still become part of a character or of a stop text is kept back until more is
        known. `ids` then holds the tokens up to the one that ends a stop text.

        Args:
          ids: all tokens of the answer so far.
          is_last: whether no more come.
        """
        if self.is_stopped:
            return ""
        whole = self._text_of(ids)
        end = self._first_stop(whole)
        if end is not None:
            self.is_stopped = True
            # The text grows with the tokens, so the first that holds a stop text can be bisected.
            counts = range(1, len(ids) + 1)
            n = bisect.bisect_left(counts, True, key=lambda n: self._has_stop(ids[:n]))
            ids, whole = ids[: n + 1], whole[:end]
        elif not is_last:
            whole = whole.rstrip(BROKEN)
            whole = whole[: len(whole) - self._begun(whole)]
        new = whole[len(self.text) :]
        self.text, self.ids = self.text + new, list(ids)
        return new

    def _text_of(self, ids: Sequence[int]) -> str:
        whole = self._decode([*self._tail, *ids])
        if whole.startswith(self._before):
            return whole[len(self._before) :]
        return self._decode(ids)  # the prompt ends within a character

    def _first_stop(self, text: str) -> int | None:
        return min((text.find(stop) for stop in self._stop if stop in text), default=None)

    def _has_stop(self, ids: Sequence[int]) -> bool:
        return self._first_stop(self._text_of(ids)) is not None

    def _begun(self, text: str) -> int:
        """How many letters at the end may begin a stop text."""
        longest = max(map(len, self._stop), default=0)
        for count in range(min(longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-count:]) for stop in self._stop):
                return count
        return 0


def token_texts(decode: Decode, ids: Sequence[int]) -> list[str]:
    """Returns the text that each token adds to the text of those before it.

    A token that ends within a character adds nothing; the one that completes it adds all of it.

    Args:
      decode: gives the text of token ids, special tokens by their names.
      ids: the tokens.
    """
    texts, begin, read = [], 0, 0
    for end in range(1, len(ids) + 1):
        before, whole = decode(ids[begin:read]), decode(ids[begin:end])
        is_part = whole.endswith(BROKEN) or not whole.startswith(before)
        if is_part and end < len(ids) and end - read < LONGEST_CHARACTER:
            texts.append("")
            continue
        texts.append(whole[len(before) :])
        begin, read = read, end
    return texts
