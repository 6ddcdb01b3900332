"""Numbers of rows: few programs, none of them for what comes once, no empty rows for what stays."""

import numpy as np

from fedsafe_jax.serving.row_counts import OFTEN, RowCounts


def test_what_stays_has_no_empty_rows_and_what_comes_once_compiles_nothing():
    rows_for = RowCounts()
    assert [rows_for(20) for _ in range(OFTEN)] == [24] * (OFTEN - 1) + [20]
    assert rows_for(5) == 20 and rows_for(20) == 20 and rows_for(21) == 24
    assert rows_for(33) == 48  # more than any so far


def test_rows_are_enough_and_few():
    rows_for, rng = RowCounts(), np.random.default_rng(0)
    counts = [20] * 5 + rng.integers(1, 21, 60).tolist()
    rows = [rows_for(count) for count in counts]
    assert all(a >= b for a, b in zip(rows, counts, strict=True))
    assert len(set(rows)) < len(set(counts)) / 2
