"""Pairs of many clients as one stream of batches, sorted by length so that little is padding."""

from collections.abc import Iterator, Sequence

import numpy as np

from fedsafe_jax.data.packing import round_up


def batches(lengths: Sequence[int], tokens: int) -> Iterator[tuple[np.ndarray, int, int]]:
    """Batches of like length, the longest first.

    Args:
      lengths: of every row.
      tokens: of a batch, padding included, at least one row.

    Yields:
      `(indices int [<= rows], width, rows)`: the shape is full but for the last batch, whose rows
      are the next power of two, so that few shapes are compiled.
    """
    order = np.argsort(-np.asarray(lengths, int), kind="stable")
    start = 0
    while start < len(order):
        width = round_up(int(lengths[order[start]]))
        full = max(tokens // width, 1)
        chosen = order[start : start + full]
        yield chosen, width, min(full, 1 << (len(chosen) - 1).bit_length())
        start += full


def stack(rows: Sequence[Sequence[int]], width: int, count: int) -> np.ndarray:
    """Right-padded rows, int32 `[count, width]`; rows past the end are empty."""
    out = np.zeros((count, width), np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out
