"""Answers as plain text: no thought, markup, curly quotes or contractions, in small letters."""

import re
import unicodedata

from fedsafe_jax.data.refusals import spoken

_APOSTROPHES = re.compile("[\u2018\u2019\u02bc\u00b4`]")
_MARKUP = re.compile('[*_#>~|"\u201c\u201d\u300c\u300d\u00ab\u00bb]')
_CONTRACTIONS = (
    (re.compile(r"\bcan'?t\b|\bcan not\b"), "cannot"),
    (re.compile(r"\bwon't\b"), "will not"),
    (re.compile(r"\bshan't\b"), "shall not"),
    (re.compile(r"\bain't\b"), "is not"),
    (re.compile(r"n't\b"), " not"),
    (re.compile(r"\bi'm\b"), "i am"),
    (re.compile(r"\b(it|that|there|what|this)'s\b"), r"\1 is"),
    (re.compile(r"'re\b"), " are"),
    (re.compile(r"'ve\b"), " have"),
    (re.compile(r"'ll\b"), " will"),
    (re.compile(r"'d\b"), " would"),
)
# Chinese and Japanese sentences end without a space.
_ENDS = re.compile(r"(?<=[.!?:])\s+|(?<=[\u3002\uff01\uff1f])|\n+")


def plain(text: str) -> str:
    """Returns a text as the rules read it.

    >>> plain("<think>Hm.</think>**Sorry:** I\u2019m not able, I can't.")
    'sorry: i am not able, i cannot.'
    """
    text = unicodedata.normalize("NFKC", spoken(text))
    text = _MARKUP.sub(" ", _APOSTROPHES.sub("'", text)).lower()
    for pattern, whole in _CONTRACTIONS:
        text = pattern.sub(whole, text)
    return re.sub(r"[ \t]+", " ", text).strip(" \n-")


def sentences(text: str, characters: int) -> list[str]:
    """Returns the sentences of the first `characters` of a text; lines count as sentences."""
    return [part.strip() for part in _ENDS.split(text[:characters]) if part and part.strip()]
