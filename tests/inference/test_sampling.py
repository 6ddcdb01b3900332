"""Filters of the next token against transformers."""

import numpy as np
import pytest

from fedsafe_jax.inference.sampling import Sampling, restrict


@pytest.mark.parametrize(
    "sampling", [Sampling(0.7), Sampling(1.3, 5), Sampling(0.9, 0, 0.6), Sampling(1.1, 0, 1.0, 0.1)]
)
def test_filters_equal_those_of_transformers(sampling):
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as theirs

    logits = np.random.default_rng(0).normal(size=(4, 50)).astype(np.float32) * 3
    expected = theirs.TemperatureLogitsWarper(sampling.temperature)(None, torch.tensor(logits))
    if sampling.top_k:
        expected = theirs.TopKLogitsWarper(sampling.top_k)(None, expected)
    if sampling.top_p < 1:
        expected = theirs.TopPLogitsWarper(sampling.top_p)(None, expected)
    if sampling.min_p:
        expected = theirs.MinPLogitsWarper(sampling.min_p)(None, expected)
    restricted = np.asarray(restrict(logits, sampling))
    np.testing.assert_array_equal(np.isinf(restricted), np.isinf(expected.numpy()))
    np.testing.assert_allclose(restricted, expected.numpy(), rtol=1e-6)
