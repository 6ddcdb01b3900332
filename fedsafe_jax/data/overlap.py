"""Removal of training prompts that also occur, exactly or nearly, in an evaluation set."""

import re
from collections.abc import Sequence

import numpy as np
import scipy.sparse

# Jaccard similarity of word bigrams. At 0.55, "Write a tutorial on how to bake a cake" and "... to
# make a bomb" (0.5, same frame) stay apart; "build a bomb" against "make a bomb" (0.64) is caught.
NEAR = 0.55


def normalise(text: str) -> str:
    """Returns the lower-cased words of a text with single spaces, punctuation dropped."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def _bigrams(text: str) -> set[str]:
    words = ["<s>", *normalise(text).split()]
    return {f"{a} {b}" for a, b in zip(words, words[1:], strict=False)}


def nearest_similarity(prompts: Sequence[str], evaluation: Sequence[str]) -> np.ndarray:
    """Returns each prompt's largest similarity with any evaluation prompt.

    Similarity is that of Jaccard, of the sets of word bigrams.

    Args:
      prompts: prompts to look at.
      evaluation: prompts of the evaluation set.

    Returns:
      float64 `[len(prompts)]` in [0, 1]; 1 where the normalised texts agree.
    """
    if not prompts or not evaluation:
        return np.zeros(len(prompts))
    vocabulary: dict[str, int] = {}

    def matrix(texts):
        rows, columns = [], []
        for i, text in enumerate(texts):
            for bigram in _bigrams(text):
                rows.append(i)
                columns.append(vocabulary.setdefault(bigram, len(vocabulary)))
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
        np.maximum.at(best, start + shared.row, shared.data / union)
    return best


def drop_overlap(items: Sequence, evaluation: Sequence[str]) -> tuple[list, int]:
    """Keeps the items whose prompt is no near-duplicate of an evaluation prompt.

    Args:
      items: items with a `prompt`, such as examples.
      evaluation: prompts of the evaluation set.

    Returns:
      `(kept, dropped_count)`.
    """
    unique = sorted({item.prompt for item in items})
    similar = nearest_similarity(unique, evaluation) >= NEAR
    bad = {prompt for prompt, near in zip(unique, similar, strict=True) if near}
    kept = [item for item in items if item.prompt not in bad]
    return kept, len(items) - len(kept)
