"""Decision on a filter's raw scores: calibration, and a threshold chosen on validation pairs."""

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize
from scipy.special import expit

TARGETS = ("f1", "recall")
# Bounds of the calibration, on log-odds of mean 0 and standard deviation 1: raw ones of a filter
# that learned little may all lie within a thousandth of one another.
SLOPES, BIASES = (0.0, 20.0), (-20.0, 20.0)


# What to say where a fit ended there.
AT_BOUND = (
    "the filter's calibration ended at a bound: its scores hardly separate the validation pairs; "
    "train it longer or on more pairs, or set filter.threshold"
)


class FilterError(ValueError):
    """The filter cannot be trained, loaded or applied as configured."""


@dataclasses.dataclass(frozen=True)
class Decision:
    """How log-odds become a verdict.

    There is no decision that lets pairs pass by a wrong number: one cannot be made.

    Attributes:
      temperature: divisor of log-odds, above 0 (Guo et al., 2017, arXiv 1706.04599).
      threshold: calibrated probability from which a pair is unsafe.
      bias: added to the divided log-odds, since the share of unsafe pairs in use is not that of
        the training data.
      at_bound: whether the fit of the calibration ended at a bound, so that its probabilities, and
        the threshold on them, mean little.

    Raises:
      FilterError: a number is none, is not finite, or is out of its range.
    """

    temperature: float = 1.0
    threshold: float = 0.5
    bias: float = 0.0
    at_bound: bool = False

    def __post_init__(self):
        check_threshold(self.threshold)
        if not (is_finite(self.temperature) and self.temperature > 0):
            raise FilterError(
                f"the filter's temperature is {self.temperature!r:.40}: expected a number above 0; "
                "train the filter again, or load another."
            )
        if not is_finite(self.bias) or not isinstance(self.at_bound, bool):
            raise FilterError(
                f"the filter's bias is {self.bias!r:.40} and at_bound {self.at_bound!r:.40}: "
                "expected a finite number and true or false; train the filter again, or load "
                "another."
            )

    def probability(self, log_odds: ArrayLike) -> np.ndarray:
        """Returns the calibrated P(unsafe), float32 `[n]`, of log-odds `[n]`.

        Raises:
          FilterError: one is not finite. NaN is below every threshold, and its pair would pass.
        """
        z = np.asarray(log_odds, np.float64) / self.temperature + self.bias
        if wrong := int((~np.isfinite(z)).sum()):
            raise FilterError(
                f"{wrong} of {z.size} scores of the filter are not finite, and nothing may pass by "
                "them: its weights overflow or diverged; use dtype='float32', lower "
                "filter.learning_rate, or load another filter."
            )
        return expit(z).astype(np.float32)


def is_finite(value: Any) -> bool:
    """Tells whether a value from a file is a number that float64 can say."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits, which JSON may hold
        return False


def check_threshold(threshold: float) -> None:
    """Checks a threshold on P(unsafe).

    Raises:
      FilterError: it is no number from 0 to 1, so that all pairs could pass by it.
    """
    if not (is_finite(threshold) and 0 <= threshold <= 1):
        raise FilterError(
            f"the filter's threshold is {threshold!r:.40}: expected a number from 0 to 1."
        )


def flag(probability: ArrayLike, threshold: float) -> np.ndarray:
    """Returns whether each pair is unsafe, bool `[n]`: each that is not surely below the threshold.

    Whatever is decided by a filter is decided here.

    Args:
      probability: P(unsafe) of each pair, `[n]`.
      threshold: P(unsafe) from which a pair is unsafe.

    Raises:
      FilterError: one of them is no probability.
    """
    check_threshold(threshold)
    p = np.asarray(probability)
    if wrong := int((~((p >= 0) & (p <= 1))).sum()):  # NaN is neither
        raise FilterError(
            f"{wrong} of {p.size} scores of the filter are no probabilities, and nothing may pass "
            "by them; load another filter."
        )
    return ~(p < threshold)


def share_weights(unsafe: Sequence[bool], share: float) -> np.ndarray:
    """Weights of pairs, mean 1, that make `share` of them unsafe; 0 leaves them as they are."""
    unsafe = np.asarray(unsafe, bool)
    own = unsafe.mean()
    if not share or own in (0.0, 1.0):
        return np.ones(len(unsafe))
    return np.where(unsafe, share / own, (1 - share) / (1 - own))


def calibrate(log_odds: Sequence[float], unsafe: Sequence[bool], share: float = 0.0) -> Decision:
    """Fits the temperature and bias that make validation labels likeliest (Platt, 1999).

    Labels are smoothed as in Platt's equation 3, so that separable ones have a finite fit. A fit
    that ends at a bound says so: where the slope is 0, scores do not rise with the labels, and all
    pairs get the same probability.

    Args:
      log_odds: raw scores of validation pairs.
      unsafe: labels of the pairs.
      share: share of unsafe pairs that is expected in use; 0 for the share in validation.
    """
    raw, unsafe = np.asarray(log_odds, np.float64), np.asarray(unsafe, bool)
    middle, spread = raw.mean(), raw.std() or 1.0
    z = (raw - middle) / spread
    weights = share_weights(unsafe, share)
    target = np.where(unsafe, 1 - 1 / (unsafe.sum() + 2), 1 / ((~unsafe).sum() + 2))

    def nll(x):
        s = x[0] * z + x[1]
        gap = weights * (expit(s) - target)
        value = (weights * (np.logaddexp(0, s) - target * s)).mean()
        return value, np.array([(gap * z).mean(), gap.mean()])

    slope, bias = minimize(nll, [1.0, 0.0], jac=True, method="L-BFGS-B", bounds=[SLOPES, BIASES]).x
    at_bound = slope in SLOPES or bias in BIASES or raw.std() == 0
    # A slope of 0 is an endless temperature, which cannot be written to a file.
    temperature = spread / max(slope, 1e-6)
    return Decision(
        float(temperature), bias=float(bias - middle / temperature), at_bound=bool(at_bound)
    )


def choose_threshold(
    probability: Sequence[float],
    unsafe: Sequence[bool],
    target: str = "f1",
    precision_floor: float = 0.9,
    share: float = 0.0,
) -> float:
    """Chooses a threshold among the probabilities of validation pairs.

    Args:
      probability: calibrated P(unsafe) of validation pairs.
      unsafe: labels of the pairs.
      target: `f1`: largest harmonic mean of precision and recall. `recall`: largest recall with at
        least `precision_floor`; the most precise threshold where none reaches the floor.
      precision_floor: least precision, in [0, 1].
      share: share of unsafe pairs that is expected in use, which precision depends on; 0 for the
        share among the pairs given.
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
        # Below the floor every value is negative, so any threshold that reaches it wins.
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
    """Fits calibration and threshold on validation pairs, see `calibrate`, `choose_threshold`."""
    decision = calibrate(log_odds, unsafe, share)
    threshold = choose_threshold(
        decision.probability(log_odds), unsafe, target, precision_floor=precision_floor, share=share
    )
    return dataclasses.replace(decision, threshold=threshold)
