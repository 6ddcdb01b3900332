"""Numbers of rows that batches are computed with: programs are compiled for each."""

import collections

from fedsafe_jax.data import packing

RECENT = 32  # batches that are remembered
OFTEN = 4  # times among these, from which a number of rows is worth programs of its own


class RowCounts:
    """Rounds numbers of prompts up to numbers of rows, so that few programs are compiled.

    Empty rows are computed too: twenty prompts in 32 rows take as long as 32. So a number that
    comes again and again, as that of clients that each ask again once they are answered, is taken
    as it is. One that comes once takes the rows of a program that is there.
    """

    def __init__(self) -> None:
        self._recent: collections.deque[int] = collections.deque(maxlen=RECENT)
        self._known: set[int] = set()

    def __call__(self, count: int) -> int:
        """Returns the rows of a batch of `count` prompts, and remembers it."""
        self._recent.append(count)
        rows = count
        if self._recent.count(count) < OFTEN:
            rows = min((n for n in self._known if n >= count), default=packing.bucket(count))
        self._known.add(rows)
        return rows
