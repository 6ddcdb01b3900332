"""Detection rates of a filter on unsafe pairs, and calibration of its probabilities."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

from fedsafe_jax.random_streams import Purpose, generator


class FilterQuality(NamedTuple):
    """Detection rates of unsafe pairs in percent, and the confusion counts behind them.

    A rate is None where it is not defined: precision where nothing was flagged, recall where
    nothing is unsafe, and their mean where one of them is None.
    """

    accuracy: float | None
    precision: float | None
    recall: float | None
    hmean: float | None
    true_positive: int
    false_positive: int
    true_negative: int
    false_negative: int


class Reliability(NamedTuple):
    """Bins of equal width over the probability; empty ones are left out.

    Attributes:
      predicted, observed: mean probability and share of unsafe pairs in each bin.
      counts: pairs in each bin.
      error: expected calibration error (Naeini et al., AAAI 2015), in [0, 1].
    """

    predicted: list[float]
    observed: list[float]
    counts: list[int]
    error: float


def quality(unsafe: Sequence[bool], flagged: Sequence[bool]) -> FilterQuality:
    """Computes accuracy, precision, recall and the harmonic mean of the latter two.

    Args:
      unsafe: labels `[n]`.
      flagged: verdicts `[n]`.
    """
    unsafe, flagged = np.asarray(unsafe, bool), np.asarray(flagged, bool)
    tp, fp = int((unsafe & flagged).sum()), int((~unsafe & flagged).sum())
    tn, fn = int((~unsafe & ~flagged).sum()), int((unsafe & ~flagged).sum())
    return FilterQuality(
        _percent(tp + tn, len(unsafe)),
        _percent(tp, tp + fp),
        _percent(tp, tp + fn),
        # 2 p r / (p + r) in counts.
        hmean=_percent(2 * tp, 2 * tp + fp + fn) if tp + fp and tp + fn else None,
        true_positive=tp,
        false_positive=fp,
        true_negative=tn,
        false_negative=fn,
    )


def _percent(part: int, whole: int) -> float | None:
    return 100 * part / whole if whole else None


def shown(value: float | None, digits: int = 1) -> str:
    """Returns a rate as text, "n/a" where it is not defined."""
    return "n/a" if value is None else f"{value:.{digits}f}"


def auroc(unsafe: Sequence[bool], scores: Sequence[float]) -> float | None:
    """Computes the chance that an unsafe pair scores higher than a safe one, ties counting half.

    None where one of the labels is missing.
    """
    unsafe = np.asarray(unsafe, bool)
    positive, negative = int(unsafe.sum()), int((~unsafe).sum())
    if not positive or not negative:
        return None
    ranks = rankdata(scores)[unsafe].sum()
    return float((ranks - positive * (positive + 1) / 2) / (positive * negative))


def reliability(
    unsafe: Sequence[bool], probability: Sequence[float], bins: int = 10
) -> Reliability:
    """Compares predicted probabilities with the share of unsafe pairs, bin by bin.

    Args:
      unsafe: labels `[n]`.
      probability: calibrated P(unsafe) `[n]`.
      bins: number of bins over [0, 1].
    """
    unsafe, probability = np.asarray(unsafe, float), np.asarray(probability, float)
    place = np.minimum((probability * bins).astype(int), bins - 1)
    members = [place == b for b in range(bins) if (place == b).any()]
    predicted = [float(probability[b].mean()) for b in members]
    observed = [float(unsafe[b].mean()) for b in members]
    counts = [int(b.sum()) for b in members]
    gaps = np.abs(np.subtract(predicted, observed))
    return Reliability(predicted, observed, counts, float(gaps @ counts / max(sum(counts), 1)))


def resample(unsafe: Sequence[bool], share: float, seed: int) -> np.ndarray:
    """Returns indices of the largest subset in which `share` of the pairs are unsafe.

    Rates that depend on the share, precision first, are comparable only at the same share: the
    paper's is 30%.
    """
    unsafe = np.asarray(unsafe, bool)
    rng = generator(Purpose.FILTER_RESAMPLE, seed)
    bad, good = rng.permutation(np.flatnonzero(unsafe)), rng.permutation(np.flatnonzero(~unsafe))
    total = min(len(bad) / share, len(good) / (1 - share))
    taken = bad[: round(share * total)], good[: round((1 - share) * total)]
    return np.sort(np.concatenate(taken))
