"""From a filter's raw score to a decision: calibration, and a threshold chosen on validation."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit

TARGETS = ("f1", "recall")


class Decision(NamedTuple):
    """How log-odds become a verdict.

    Attributes:
      temperature: log-odds are divided by it (Guo et al., 2017).
      threshold: calibrated probability from which a pair is unsafe.
    """

    temperature: float = 1.0
    threshold: float = 0.5

    def probability(self, log_odds) -> np.ndarray:
        """Calibrated P(unsafe), float32."""
        return expit(np.asarray(log_odds, np.float64) / self.temperature).astype(np.float32)


def fit_temperature(log_odds: Sequence[float], unsafe: Sequence[bool]) -> float:
    """The temperature that makes validation labels likeliest, in [0.05, 20]."""
    z, sign = np.asarray(log_odds, np.float64), np.where(np.asarray(unsafe, bool), 1.0, -1.0)

    def nll(log_temperature):
        return np.logaddexp(0, -sign * z / np.exp(log_temperature)).mean()

    return float(np.exp(minimize_scalar(nll, bounds=np.log([0.05, 20]), method="bounded").x))


def choose_threshold(
    probability: Sequence[float],
    unsafe: Sequence[bool],
    target: str = "f1",
    precision_floor: float = 0.9,
) -> float:
    """A threshold among validation pairs' probabilities.

    Args:
      probability: calibrated, of validation pairs.
      unsafe: their labels.
      target: `f1`: largest harmonic mean of precision and recall. `recall`: largest recall with at
        least `precision_floor`; the most precise one where none reaches it.
      precision_floor: in [0, 1].
    """
    p, unsafe = np.asarray(probability, np.float64), np.asarray(unsafe, bool)
    order = np.argsort(-p, kind="stable")
    ranked, hits = p[order], np.cumsum(unsafe[order])
    last = np.append(ranked[1:] != ranked[:-1], True)  # equal scores are flagged together
    flagged = np.arange(1, len(p) + 1)
    precision, recall = hits / flagged, hits / max(unsafe.sum(), 1)
    if target == "f1":
        value = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    else:
        value = np.where(precision >= precision_floor, recall, precision - 1)
    best = int(np.argmax(np.where(last, value, -np.inf)))
    # Halfway to the next score: a threshold on a score would turn on its last digit.
    below = ranked[best + 1] if best + 1 < len(p) else 0.0
    return float((ranked[best] + below) / 2)


def fit(
    log_odds: Sequence[float],
    unsafe: Sequence[bool],
    target: str = "f1",
    precision_floor: float = 0.9,
) -> Decision:
    """Temperature and threshold from validation pairs."""
    calibrated = Decision(fit_temperature(log_odds, unsafe))
    p = calibrated.probability(log_odds)
    return calibrated._replace(threshold=choose_threshold(p, unsafe, target, precision_floor))
