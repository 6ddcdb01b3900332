"""Answers compared with reference answers, as SQuAD does (Rajpurkar et al., 2016, 1606.05250).

The formulas are those of SQuAD's `evaluate-v1.1.py`.
"""

import collections
import re
import string

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Returns a text in lower case, without punctuation, articles and repeated blanks.

    >>> normalise("The capital, Paris!")
    'capital paris'
    """
    bare = text.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def exact(answer: str, reference: str) -> bool:
    """Returns whether two texts are the same once they are normalised."""
    return normalise(answer) == normalise(reference)


def f1(answer: str, reference: str) -> float:
    """Returns the harmonic mean of precision and recall of the answer's words, from 0 to 1.

    0 without a common word, also where both are empty, as in version 1.1 of the script.
    """
    ours, theirs = normalise(answer).split(), normalise(reference).split()
    same = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    if not same:
        return 0.0
    precision, recall = same / len(ours), same / len(theirs)
    return 2 * precision * recall / (precision + recall)
