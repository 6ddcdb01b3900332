"""Packs encoded dialogues into dense rows, kept apart by segment ids and positions."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedsafe_jax.data.chat import Encoded


class Batch(NamedTuple):
    """Packed rows; every field has the shape `[..., rows, seq]`."""

    tokens: np.ndarray  # int32
    targets: np.ndarray  # int32, the next token of the same example, or what it learns instead
    mask: np.ndarray  # float32, weight of the target in the loss, 0 where it is not learned
    segment_ids: np.ndarray  # int32, 0 is padding, examples count from 1 in each row
    positions: np.ndarray  # int32, from 0 in each example


class NoisyBatch(NamedTuple):
    """A `Batch` with 32 random bits of each token, from which dropout is drawn."""

    tokens: np.ndarray
    targets: np.ndarray
    mask: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    noise: np.ndarray  # uint32


def assign_rows(lengths: Sequence[int], seq: int) -> list[list[int]]:
    """Assigns examples to rows by first-fit-decreasing bin packing.

    Args:
      lengths: token counts, each at most `seq`.
      seq: capacity of a row.

    Returns:
      The indices of the examples in each row.
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for row, space in enumerate(free):
            if lengths[index] <= space:
                rows[row].append(index)
                free[row] -= lengths[index]
                break
        else:
            rows.append([index])
            free.append(seq - lengths[index])
    return rows


def fill(examples: Sequence[Encoded], rows: Sequence[Sequence[int]], count: int, seq: int) -> Batch:
    """Writes examples into rows.

    Args:
      examples: encoded examples.
      rows: indices of the examples in each row, from `assign_rows`.
      count: rows of the batch, `[count, seq]`; those beyond `rows` stay padding.
      seq: tokens a row.
    """
    batch = Batch(
        *(
            np.zeros((count, seq), dtype)
            for dtype in (np.int32, np.int32, np.float32, np.int32, np.int32)
        )
    )
    for r, members in enumerate(rows):
        start = 0
        for segment, index in enumerate(members, 1):
            ids, loss_mask, _, target = examples[index]
            end = start + len(ids)
            batch.tokens[r, start:end] = ids
            batch.targets[r, start : end - 1] = (
                ids[1:] if target is None else np.where(loss_mask[1:] > 0, target, ids[1:])
            )
            batch.mask[r, start : end - 1] = loss_mask[1:]
            batch.segment_ids[r, start:end] = segment
            batch.positions[r, start:end] = np.arange(len(ids))
            start = end
    return batch


def pack(examples: Sequence[Encoded], seq: int, rows: int | None = None) -> Batch:
    """Packs examples into a batch `[rows, seq]`.

    Args:
      examples: encoded examples.
      seq: tokens a row.
      rows: rows of the batch; None for as few as first fit needs.

    Raises:
      ValueError: the examples need more than `rows` rows.
    """
    assigned = assign_rows([len(e.ids) for e in examples], seq)
    rows = len(assigned) if rows is None else rows
    if len(assigned) > rows:
        raise ValueError(f"{len(examples)} examples need {len(assigned)} rows of {seq}, not {rows}")
    return fill(examples, assigned, rows, seq)


def bucket(count: int) -> int:
    """Rounds a row count up to 1, 2, 3, 4, 6, 8, 12, ...: few shapes, at most a third unused.

    >>> [bucket(count) for count in (1, 5, 9, 13)]
    [1, 6, 12, 16]
    """
    size = 1
    while size < count:
        size = (
            size * 3 // 2
            if size & (size - 1) == 0 and size > 1
            else (size * 4 // 3 if size > 1 else 2)
        )
    return size


def round_up(length: int, multiple: int = 16) -> int:
    """Rounds the length of a row up, so that few shapes are compiled and little is padding.

    Args:
      length: tokens.
      multiple: the result is a multiple of it; for long rows, of an eighth of a power of two.
    """
    multiple = max(multiple, (1 << length.bit_length()) // 8)
    return -(-max(length, 1) // multiple) * multiple
