"""When Constitutional AI runs, and how much of it."""

from typing import NamedTuple

SCHEDULES = ("light", "full", "final", "adaptive")


class Amount(NamedTuple):
    """What a round does.

    Attributes:
      prompts: share of the prompts asked for that are revised; 0 for no CAI, infinity for all that
        there are.
      steps: share of the training steps; infinity for an epoch.
      probe: what was measured first: share refused and its 95% interval, in percent; or None.
    """

    prompts: float
    steps: float
    probe: dict | None = None


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


def adaptive(refused: float, interval: tuple[float, float], target: float) -> Amount:
    """Of a round, by what the aggregated model said to a few prompts of the server's own.

    CAI runs when the whole interval of the refusal rate lies below the target, so that a model that
    may well be safe is left alone; prompts and steps are in proportion to what is missing.

    Args:
      refused: share of the prompts refused.
      interval: its 95% interval.
      target: wanted share. All in percent.
    """
    probe = {"refused": refused, "ci95": list(interval)}
    share = (target - refused) / target if interval[1] < target else 0.0
    return Amount(share, share, probe)
