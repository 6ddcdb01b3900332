"""Pairs of many clients as one stream of batches, sorted by length so that little is padding."""

from collections.abc import Iterator, Sequence

import numpy as np

WIDTH_STEP = 16  # rows are padded to a multiple of so many tokens


def width_of(length: int) -> int:
    """The width of rows that hold `length` tokens: multiples of 16, of 32 beyond 128, and so on."""
    step = max(WIDTH_STEP, (1 << max(int(length) - 1, 1).bit_length()) // 8)
    return -(-max(length, 1) // step) * step


def batches(lengths: Sequence[int], tokens: int, multiple: int = 1) -> Iterator[np.ndarray]:
    """Indices of batches of like length, the longest first.

    Args:
      lengths: of every row.
      tokens: of a batch, padding included, at least one row.
      multiple: rows of a batch are a multiple of it (devices), except the last of a width.

    Yields:
      int `[rows]`; all rows of a batch have the same `width_of`.
    """
    widths = np.array([width_of(n) for n in lengths], int)
    for width in sorted(set(widths.tolist()), reverse=True):
        mine = np.flatnonzero(widths == width)
        rows = rows_of(width, tokens, multiple)
        for start in range(0, len(mine), rows):
            yield mine[start : start + rows]


def rows_of(width: int, tokens: int, multiple: int = 1) -> int:
    """Rows of a full batch."""
    return max(tokens // width // multiple, 1) * multiple


def stack(rows: Sequence[Sequence[int]], width: int, count: int) -> np.ndarray:
    """Right-padded rows, int32 `[count, width]`; rows past the end are empty."""
    out = np.zeros((count, width), np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out
