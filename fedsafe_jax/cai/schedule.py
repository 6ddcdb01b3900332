"""Schedules: when Constitutional AI runs, and how much of it."""

import math
from collections.abc import Callable
from typing import NamedTuple

LEAST = 3  # steps between probes of `adaptive`: fewer would cost less than the probe
LIMIT = 2  # rounds of `light`: no round of `adaptive` has more steps


class Amount(NamedTuple):
    """Amount of Constitutional AI in a round.

    Attributes:
      prompts: share of the configured number of prompts that is revised; 0 for no CAI, infinity for
        all prompts of the pool.
      steps: share of the configured training steps; infinity for an epoch.
    """

    prompts: float
    steps: float


NONE, LIGHT, FULL = Amount(0, 0), Amount(1, 1), Amount(float("inf"), float("inf"))


def light(last: bool) -> Amount:
    """Returns the same number of steps for every round, as in the paper.

    Args:
      last: whether it is the last round, as for every schedule.
    """
    del last
    return LIGHT


def full(last: bool) -> Amount:
    """Returns an epoch over all prompts for every round."""
    del last
    return FULL


def final(last: bool) -> Amount:
    """Returns a light round for the last round, nothing for the rounds before."""
    return LIGHT if last else NONE


def adaptive_steps(refused: float, high: float, target: float, steps: int) -> int:
    """Computes the number of training steps until the next probe.

    Training goes on while the whole interval of the refusal rate lies below the target, so that a
    model that may well be safe is left alone. Steps are in proportion to the gap.

    Args:
      refused: refusal rate on the probe's prompts, in percent.
      high: upper bound of its 95% interval, in percent.
      target: wanted rate, in percent.
      steps: number of steps when nothing is refused.

    Returns:
      0, or at least `LEAST`.
    """
    if high >= target:
        return 0
    return max(math.ceil(steps * (target - refused) / target), LEAST)


class Schedule(NamedTuple):
    """One schedule.

    Attributes:
      amount: `(whether the round is the last) -> Amount`.
      steps_after_probe: `(refused, high, target, steps) -> steps` where the model's answers to the
        server's own prompts decide how long to train, see `adaptive_steps`; None where the model is
        not probed.
    """

    amount: Callable[[bool], Amount]
    steps_after_probe: Callable[[float, float, float, int], int] | None = None


SCHEDULES = {
    "light": Schedule(light),
    "full": Schedule(full),
    "final": Schedule(final),
    # The prompts of a light round, however many the steps: harmful answers are what teaches.
    "adaptive": Schedule(light, adaptive_steps),
}
