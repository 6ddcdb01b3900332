"""Batches over the pairs of many clients, sorted by length so that little is padding."""

from collections.abc import Iterator, Sequence

import numpy as np

from fedsafe_jax.data.packing import round_up


def batches(lengths: Sequence[int], tokens: int) -> Iterator[tuple[np.ndarray, int, int]]:
    """Groups rows of similar length into batches, the longest first.

    Args:
      lengths: tokens of every row.
      tokens: most tokens of a batch, padding included; a longer row is a batch by itself.

    Yields:
      `(indices int [<= rows], width, rows)`. Every batch but the last is full; the last has the
      next power of two as its number of rows, so that few shapes are compiled.
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
    """Pads rows on the right, int32 `[count, width]`; rows past the last one are empty."""
    out = np.zeros((count, width), np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out
