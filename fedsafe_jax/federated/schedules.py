"""Learning rates of the clients: a decay over the rounds, and one over the local steps on top."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# `progress in [0, 1] -> factor on the rate` by name: 1 at the start, 0 at the end, or always 1.
DECAYS: dict[str, Callable] = {
    "cosine": lambda progress: 0.5 * (1 + np.cos(np.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0 + 0 * progress,
}


class LearningRates(NamedTuple):
    """The learning rate of every round and local step.

    Attributes:
      start, end: rates after the warm-up, and at the end of the last round.
      rounds, local_steps: rounds of the run, and steps of a client in a round.
      warmup_rounds: rounds in which the rate climbs to `start`; fewer than `rounds`.
      decay: decay over the rounds, a name in `DECAYS`.
      step_decay: decay over the local steps of a round, a name in `DECAYS`.
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
    return rates.end + (rates.start - rates.end) * DECAYS[rates.decay](progress)


def step_rates(rates: LearningRates, t: int) -> np.ndarray:
    """Returns the learning rate of each local step of round `t`, float32 `[local_steps]`."""
    progress = np.arange(rates.local_steps) / rates.local_steps
    factor = DECAYS[rates.step_decay](progress)
    return (round_rate(rates, t) * factor).astype(np.float32)
