"""Control tokens in what people write: they stay text, and never end a turn or open another.

A tokenizer makes one token of `<|im_end|>` wherever it stands, also in the middle of a message. In
contents such a name is broken up by a character that no text has, and the text is tokenised piece
by piece around it.
"""

import functools
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Noncharacters of Unicode: no text that is meant to be exchanged has them.
BREAK, MARK = "\ufdd0", "\ufdd1"
# A template finds the end of a thought by this name, which answers may thus hold.
THOUGHT = ("<think>", "</think>")


@functools.lru_cache(maxsize=32)
def names(tokenizer: "PreTrainedTokenizerBase", template: str) -> frozenset[str]:
    """Returns the texts of the control tokens.

    These are special tokens, and the added ones that the chat template writes. White space is
    text, though some tokenizers have tokens of their own for it.
    """
    return frozenset(
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.content.strip() and (token.special or token.content in template)
    )


@functools.lru_cache(maxsize=32)
def _pattern(control: frozenset[str], thoughts: bool) -> re.Pattern[str]:
    kept = THOUGHT if thoughts else ()
    # One character cannot be broken up. The longest first: a name may begin with another one.
    ordered = sorted((n for n in control if len(n) > 1 and n not in kept), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or "(?!)")


def break_up(text: str, control: frozenset[str], thoughts: bool = False) -> str:
    """Returns a message's text with `BREAK` inside the name of every control token.

    Args:
      text: what a person or a model wrote.
      control: see `names`.
      thoughts: whether the marks of a thought stay whole.
    """
    pattern = _pattern(control, thoughts)
    text = text.replace(BREAK, "").replace(MARK, "")
    while pattern.search(text):  # again, for names that overlap another one
        text = pattern.sub(lambda name: f"{name[0][0]}{BREAK}{name[0][1:]}", text)
    return text


def tokenise(
    tokenizer: "PreTrainedTokenizerBase", text: str
) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokenises a rendered dialogue.

    Args:
      tokenizer: a fast tokenizer, which says where its tokens stand.
      text: the dialogue; where it has `BREAK`, no token spans it.

    Returns:
      `(ids, spans)`: each token's id, and the characters of `text` that it stands for.
    """
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    begin = 0
    for piece in text.split(BREAK):
        if piece:
            tokens = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)
            ids += tokens["input_ids"]
            spans += [(begin + start, begin + end) for start, end in tokens["offset_mapping"]]
        begin += len(piece) + len(BREAK)
    return ids, spans
