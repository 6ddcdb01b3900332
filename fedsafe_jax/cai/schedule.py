"""When Constitutional AI runs, and how much of it."""

import math
from typing import NamedTuple

SCHEDULES = ("light", "full", "final", "adaptive")


LEAST = 3  # steps between probes of `adaptive`: fewer would cost less than the probe
LIMIT = 2  # rounds of `light`: no round of `adaptive` has more steps


class Amount(NamedTuple):
    """What a round does.

    Attributes:
      prompts: share of the prompts asked for that are revised; 0 for no CAI, infinity for all that
        there are.
      steps: share of the training steps; infinity for an epoch.
    """

    prompts: float
    steps: float


NONE, LIGHT, FULL = Amount(0, 0), Amount(1, 1), Amount(float("inf"), float("inf"))


def amount(schedule: str, last: bool) -> Amount:
    """Of a round under a schedule that does not look at the model.

    Args:
      schedule: `light`: a fixed number of steps every round (the paper); `full`: an epoch over all
        prompts every round; `final`: `light` in the last round only.
      last: the last round.
    """
    if schedule == "full":
        return FULL
    return NONE if schedule == "final" and not last else LIGHT


def adaptive(refused: float, high: float, target: float, steps: int) -> int:
    """Steps to go on with, by what the model said to a few prompts of the server's own.

    CAI runs while the whole interval of the refusal rate lies below the target, so that a model
    that may well be safe is left alone. Steps are in proportion to what is missing.

    Args:
      refused: share of the prompts refused.
      high: the upper bound of its 95% interval.
      target: wanted share. All in percent.
      steps: when nothing is refused.

    Returns:
      0, or at least `LEAST`.
    """
    if high >= target:
        return 0
    return max(math.ceil(steps * (target - refused) / target), LEAST)
