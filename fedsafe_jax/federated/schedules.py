"""Learning rates of the clients: a decay over the rounds, and one over the local steps on top."""

from typing import NamedTuple

import numpy as np

DECAYS = ("cosine", "linear", "constant")


class LearningRates(NamedTuple):
    """The learning rate of every round and local step.

    Attributes:
      start, end: rate after the warm-up, and at the end of the last round.
      rounds, local_steps: rounds of the run, and steps of a client in a round.
      warmup_rounds: rounds in which the rate climbs to `start`; fewer than `rounds`.
      decay: decay over the rounds, one of `DECAYS`.
      step_decay: decay over the local steps of a round, one of `DECAYS`.
    """

    start: float
    end: float
    rounds: int
    local_steps: int
    warmup_rounds: int = 0
    decay: str = "cosine"
    step_decay: str = "constant"


def round_rate(rates: LearningRates, t: int) -> float:
    """Returns the learning rate at the beginning of round `t`, from 0."""
    if t < rates.warmup_rounds:
        return rates.start * (t + 1) / (rates.warmup_rounds + 1)
    progress = (t - rates.warmup_rounds) / (rates.rounds - rates.warmup_rounds)
    return rates.end + (rates.start - rates.end) * _decay_factor(rates.decay, progress)


def step_rates(rates: LearningRates, t: int) -> np.ndarray:
    """Returns the learning rate of each local step of round `t`, float32 `[local_steps]`."""
    progress = np.arange(rates.local_steps) / rates.local_steps
    factor = _decay_factor(rates.step_decay, progress)
    return (round_rate(rates, t) * factor).astype(np.float32)


def _decay_factor(decay: str, progress):
    """Returns the factor on the rate: 1 at the start (`progress=0`), 0 at the end, or always 1."""
    if decay == "cosine":  # OpenFedLLM's, over rounds
        return 0.5 * (1 + np.cos(np.pi * progress))
    return 1 - progress if decay == "linear" else 1.0 + 0 * progress
