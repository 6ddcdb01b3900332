"""A simulated filter: verdicts drawn from the labels, with a given recall and precision."""

from collections.abc import Sequence

import numpy as np

from fedsafe_jax.data.examples import UNSAFE, Example
from fedsafe_jax.random_streams import Purpose, generator


def simulate(examples: Sequence[Example], recall: float, precision: float, seed: int) -> np.ndarray:
    """Draws the verdicts of a filter with a given recall and precision.

    One draw per pair is compared with the rate of its label, so a larger recall flags the same
    pairs and more.

    Args:
      examples: pairs with their labels.
      recall: share of unsafe pairs that are flagged.
      precision: share of flagged pairs that are unsafe; decides how many safe ones are flagged.
      seed: seed of the draws.

    Returns:
      Probabilities 0 or 1, float32 `[n]`.
    """
    unsafe = np.array([e.label == UNSAFE for e in examples], bool)
    draws = generator(Purpose.FILTER_VERDICTS, seed).random(len(examples))
    false_alarms = recall * unsafe.sum() * (1 - precision) / max(precision, 1e-9)
    rate = min(false_alarms / max((~unsafe).sum(), 1), 1.0)
    return (draws < np.where(unsafe, recall, rate)).astype(np.float32)
