"""Removal of training prompts that also occur, exactly or nearly, in an evaluation set.

Two rules find what is near. The first compares the form: word bigrams, and character trigrams
where a script has no spaces. The second compares what is asked for: English content words without
stop words, words of request ("write a tutorial on how to ...") and endings, so that one request in
two wordings is found. Only texts with two content words in common can be near by the second.
"""

import functools
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import scipy.sparse

# Jaccard similarity of word bigrams. At 0.55, "Write a tutorial on how to bake a cake" and "... to
# make a bomb" (0.5, same frame) stay apart; "build a bomb" against "make a bomb" (0.64) is caught.
NEAR = 0.55
# Jaccard similarity of content words: two of three. Beside AdvBench it drops 9 of 260 harmful
# instructions more than the form does, and none of 22,936 harmless ones; 0.5 drops 19 of those.
NEAR_CONTENT = 0.65
# A later turn of a dialogue as short as "Yes, please." says nothing of what is talked about.
SHORTEST_LATER_TURN = 4  # words, or characters of a script without spaces

# Han, kana, Thai, Lao, Khmer, Myanmar: scripts that put no spaces between words. Korean does.
SPACELESS = (
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003134f\u0e00-\u0eff\u1000-\u109f\uaa60-\uaa7f\u1780-\u17ff"
)
STOP_WORDS = frozenset(
    "a about after all also am an and any are as at be because been before being both but by can "
    "could d did do does doing don down each few for from further had has have having he her here "
    "hers him his i if in into is it its itself just ll m me more most my no nor not now of off on "
    "once one only or other our out over own re s same she should so some such t than that the "
    "their them then there these they this those through to too under until up ve very was we were "
    "what when where which while who whom whose why will with without would you your".split()
)
# Words of the request and not of what is asked for.
FRAME_WORDS = frozenset(
    "article best blog build code come compose comprehensive convince create demonstrate describe "
    "design detail detailed develop draft encourage essay example explain explanation follow "
    "following generate get give guide help how idea inform instruct instruction instructions "
    "learn let list make manual method need offer outline people persuade plan please post produce "
    "program promote provide publish script share show someone speech step steps story strategy "
    "suggest talk teach tell text think tip tips tutorial use using video want way ways write "
    "written".split()
)


@functools.cache
def _word() -> re.Pattern:
    """Letters, digits and the marks that belong to them: vowel signs are no letters to `re`."""
    points = map(chr, range(sys.maxunicode + 1))
    marks = "".join(re.escape(c) for c in points if unicodedata.category(c).startswith("M"))
    return re.compile(rf"(?:[^\W_]|[{marks}])+")


def normalise(text: str) -> str:
    """Returns the words of a text in one form: without case or punctuation, with single spaces.

    Characters are compared by what they stand for (NFKC, case folding), in every script. A text
    without a letter or digit becomes "", which counts as equal to nothing.
    """
    if text.isascii():
        return " ".join(re.findall(r"[a-z0-9]+", text.lower()))
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(_word().findall(folded))


def stem(word: str) -> str:
    """Returns an English word without the endings of plural, "-ing" and "-ed".

    "stealing" and "steals" become "steal", "robbing" and "robs" "rob". The result is for comparison
    alone: final "e" and doubled letters go too, so that "making" meets "make".
    """
    if len(word) > 4 and word.endswith("ies"):
        word = word[:-3] + "y"
    elif len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    for ending in ("ing", "ed"):
        left = word.removesuffix(ending)
        if left != word and len(left) > 2 and re.search("[aeiouy]", left):
            word = left
    word = word.removesuffix("e") if len(word) > 3 else word
    return word[:-1] if len(word) > 3 and word[-1] == word[-2] else word


_UNSAID = STOP_WORDS | FRAME_WORDS
_UNSAID_STEMS = frozenset(map(stem, _UNSAID))


def content_words(text: str) -> set[str]:
    """Returns the stems of an English text's content words; none of another script's words."""
    words = [w for w in normalise(text).split() if w.isascii() and w not in _UNSAID]
    return {stem(w) for w in words} - _UNSAID_STEMS


def pieces(text: str) -> set[str]:
    """Returns what the form of a text is compared by.

    These are the bigrams of words, the first of them with the beginning, and the trigrams of
    characters of scripts without spaces. A mixed text has both, a text without letters none.
    """
    normal = normalise(text)
    if normal.isascii():
        words, characters = normal.split(), ""
    else:
        characters = "".join(re.findall(f"[{SPACELESS}]+", normal))
        words = re.sub(f"[{SPACELESS}]+", " ", normal).split()
    marked = ["<s>", *words]
    parts = {f"{a} {b}" for a, b in zip(marked, marked[1:], strict=False)}
    if characters:
        parts |= {characters[i : i + 3] for i in range(max(1, len(characters) - 2))}
    return parts


def _jaccard(
    prompts: Sequence[str], evaluation: Sequence[str], pieces_of: Callable, at_least: int
) -> np.ndarray:
    """Returns each prompt's largest similarity, over evaluation prompts with enough in common.

    Args:
      prompts, evaluation: texts.
      pieces_of: `text -> set of pieces`.
      at_least: number of pieces in common below which the similarity is 0.
    """
    vocabulary: dict[str, int] = {}

    def matrix(texts):
        rows, columns = [], []
        for i, text in enumerate(texts):
            for piece in pieces_of(text):
                rows.append(i)
                columns.append(vocabulary.setdefault(piece, len(vocabulary)))
        return rows, columns, len(texts)

    parts = [matrix(prompts), matrix(sorted(set(evaluation)))]
    a, b = (
        scipy.sparse.csr_array(
            (np.ones(len(rows), np.float32), (rows, columns)), shape=(count, len(vocabulary))
        )
        for rows, columns, count in parts
    )
    size_a, size_b = a.sum(axis=1), b.sum(axis=1)
    best = np.zeros(a.shape[0])
    for start in range(0, a.shape[0], 2048):  # Blocks of rows bound the memory of the product.
        shared = (a[start : start + 2048] @ b.T).tocoo()
        union = size_a[start + shared.row] + size_b[shared.col] - shared.data
        similarity = np.where(shared.data >= at_least, shared.data / union, 0)
        np.maximum.at(best, start + shared.row, similarity)
    return best


def nearest_similarity(prompts: Sequence[str], evaluation: Sequence[str]) -> np.ndarray:
    """Returns each prompt's largest similarity of form with any evaluation prompt.

    Similarity is that of Jaccard, of the sets of `pieces`.

    Args:
      prompts: prompts to look at.
      evaluation: prompts of the evaluation set.

    Returns:
      float64 `[len(prompts)]` in [0, 1]; 1 where the normalised texts agree, 0 for a text without
      letters.
    """
    if not prompts or not evaluation:
        return np.zeros(len(prompts))
    return _jaccard(prompts, evaluation, pieces_of=pieces, at_least=1)


def nearest_content(prompts: Sequence[str], evaluation: Sequence[str]) -> np.ndarray:
    """Returns each prompt's largest similarity of content words with any evaluation prompt.

    As `nearest_similarity`, of the sets of `content_words`; fewer than two in common count as none.
    """
    if not prompts or not evaluation:
        return np.zeros(len(prompts))
    return _jaccard(prompts, evaluation, pieces_of=content_words, at_least=2)


def is_near(prompts: Sequence[str], evaluation: Sequence[str]) -> np.ndarray:
    """Returns whether each prompt is near an evaluation prompt by either rule, bool `[prompts]`."""
    form = nearest_similarity(prompts, evaluation) >= NEAR
    return form | (nearest_content(prompts, evaluation) >= NEAR_CONTENT)


def _asked(messages: Iterable[tuple[str, str]]) -> list[str]:
    """The user turns that are looked at: the first, and later ones that say enough alone."""
    turns = [text for role, text in messages if role == "user"]
    return turns[:1] + [t for t in turns[1:] if len(pieces(t)) >= SHORTEST_LATER_TURN]


def drop_overlap(items: Sequence, evaluation: Sequence[str]) -> tuple[list, int]:
    """Keeps the items of whose user turns none is a near-duplicate of an evaluation prompt.

    Args:
      items: items with `messages`, such as examples.
      evaluation: prompts of the evaluation set.

    Returns:
      `(kept, dropped_count)`.
    """
    asked = [_asked(item.messages) for item in items]
    unique = sorted({turn for turns in asked for turn in turns})
    bad = {t for t, near in zip(unique, is_near(unique, evaluation), strict=True) if near}
    kept = [item for item, turns in zip(items, asked, strict=True) if bad.isdisjoint(turns)]
    return kept, len(items) - len(kept)
