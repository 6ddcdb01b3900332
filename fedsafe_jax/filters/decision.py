"""From a filter's raw score to a decision: calibration, and a threshold chosen on validation."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

TARGETS = ("f1", "recall")
SLOPES, BIASES = (0.05, 20.0), (-20.0, 20.0)  # bounds of the calibration


class Decision(NamedTuple):
    """How log-odds become a verdict.

    Attributes:
      temperature: log-odds are divided by it (Guo et al., 2017).
      threshold: calibrated probability from which a pair is unsafe.
      bias: added to them then: the share of unsafe pairs in use is not that of the training data.
    """

    temperature: float = 1.0
    threshold: float = 0.5
    bias: float = 0.0

    def probability(self, log_odds) -> np.ndarray:
        """Calibrated P(unsafe), float32."""
        z = np.asarray(log_odds, np.float64) / self.temperature + self.bias
        return expit(z).astype(np.float32)


def share_weights(unsafe: Sequence[bool], share: float) -> np.ndarray:
    """Weights of pairs, mean 1, that make `share` of them unsafe; 0 leaves them as they are."""
    unsafe = np.asarray(unsafe, bool)
    found = unsafe.mean()
    if not share or found in (0.0, 1.0):
        return np.ones(len(unsafe))
    return np.where(unsafe, share / found, (1 - share) / (1 - found))


def calibrate(log_odds: Sequence[float], unsafe: Sequence[bool], share: float = 0.0) -> Decision:
    """Temperature and bias that make validation labels likeliest (Platt, 1999).

    Labels are smoothed as in Platt's equation 3, so that separable ones have a finite fit.

    Args:
      log_odds: of validation pairs.
      unsafe: their labels.
      share: of unsafe pairs that is expected in use; 0: as in validation.
    """
    z, unsafe = np.asarray(log_odds, np.float64), np.asarray(unsafe, bool)
    weights = share_weights(unsafe, share)
    target = np.where(unsafe, 1 - 1 / (unsafe.sum() + 2), 1 / ((~unsafe).sum() + 2))

    def nll(x):
        s = x[0] * z + x[1]
        gap = weights * (expit(s) - target)
        value = (weights * (np.logaddexp(0, s) - target * s)).mean()
        return value, np.array([(gap * z).mean(), gap.mean()])

    found = minimize(nll, [1.0, 0.0], jac=True, method="L-BFGS-B", bounds=[SLOPES, BIASES]).x
    return Decision(temperature=float(1 / found[0]), bias=float(found[1]))


def choose_threshold(
    probability: Sequence[float],
    unsafe: Sequence[bool],
    target: str = "f1",
    precision_floor: float = 0.9,
    share: float = 0.0,
) -> float:
    """A threshold among validation pairs' probabilities.

    Args:
      probability: calibrated, of validation pairs.
      unsafe: their labels.
      target: `f1`: largest harmonic mean of precision and recall. `recall`: largest recall with at
        least `precision_floor`; the most precise one where none reaches it.
      precision_floor: in [0, 1].
      share: of unsafe pairs that is expected in use, which precision depends on; 0: as here.
    """
    p, unsafe = np.asarray(probability, np.float64), np.asarray(unsafe, bool)
    weights = share_weights(unsafe, share)
    order = np.argsort(-p, kind="stable")
    ranked, hits = p[order], np.cumsum((weights * unsafe)[order])
    last = np.append(ranked[1:] != ranked[:-1], True)  # equal scores are flagged together
    flagged = np.cumsum(weights[order])
    precision, recall = hits / flagged, hits / max((weights * unsafe).sum(), 1e-12)
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
    share: float = 0.0,
) -> Decision:
    """Calibration and threshold from validation pairs, see `calibrate` and `choose_threshold`."""
    found = calibrate(log_odds, unsafe, share)
    p = found.probability(log_odds)
    threshold = choose_threshold(p, unsafe, target, precision_floor, share)
    return found._replace(threshold=threshold)
