"""Batches over pairs of all lengths."""

import numpy as np

from fedsafe_jax.data.packing import round_up
from fedsafe_jax.filters import stream


def test_streams_cover_every_pair_with_little_padding():
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 128, 500)
    seen, padded = [], 0
    shapes = set()
    for chosen, width, rows in stream.batches(lengths, 2048):
        assert lengths[chosen].max() <= width and len(chosen) <= rows
        assert rows * width <= 2048
        seen += chosen.tolist()
        padded += rows * width
        shapes.add((rows, width))
    assert len(shapes) <= 9  # what is compiled: a shape for each width, and the last
    assert sorted(seen) == list(range(500))
    assert lengths.sum() / padded > 0.85
    assert [round_up(n) for n in (1, 16, 17, 128, 129, 300)] == [16, 16, 32, 128, 160, 320]
