"""Detection rates of a filter on unsafe pairs, and calibration of its probabilities."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata


class FilterQuality(NamedTuple):
    """Detection rates of unsafe pairs in percent, and the confusion counts behind them."""

    accuracy: float
    precision: float
    recall: float
    hmean: float
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
    precision, recall = 100 * tp / max(tp + fp, 1), 100 * tp / max(tp + fn, 1)
    hmean = 2 * precision * recall / max(precision + recall, 1e-9)
    accuracy = 100 * (tp + tn) / max(len(unsafe), 1)
    return FilterQuality(
        accuracy,
        precision,
        recall,
        hmean=hmean,
        true_positive=tp,
        false_positive=fp,
        true_negative=tn,
        false_negative=fn,
    )


def auroc(unsafe: Sequence[bool], scores: Sequence[float]) -> float:
    """Computes the chance that an unsafe pair scores higher than a safe one, ties counting half.

    NaN where one of the labels is missing.
    """
    unsafe = np.asarray(unsafe, bool)
    positive, negative = int(unsafe.sum()), int((~unsafe).sum())
    if not positive or not negative:
        return float("nan")
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
    rng = np.random.default_rng([seed, 11])
    bad, good = rng.permutation(np.flatnonzero(unsafe)), rng.permutation(np.flatnonzero(~unsafe))
    total = min(len(bad) / share, len(good) / (1 - share))
    taken = bad[: round(share * total)], good[: round((1 - share) * total)]
    return np.sort(np.concatenate(taken))
