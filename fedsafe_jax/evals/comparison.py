"""Paired comparison of arms: they answer the same items, so each item is compared with itself."""

import itertools
from collections.abc import Mapping, Sequence

from fedsafe_jax.evals import statistics
from fedsafe_jax.evals.task import EvalOptions, EvalSet


def differences(
    sets: Mapping[str, EvalSet],
    outcomes: Mapping[str, Sequence[dict]],
    references: Mapping[str, Sequence[str]],
    options: EvalOptions,
) -> list[dict]:
    """Compares arms with their references on every figure of every task.

    Args:
      sets: the evaluation sets by name.
      outcomes: outcomes by the name of the set, a dict for each seed, by arm.
      references: names of the arms that an arm is compared with, by arm.
      options: sizes and judges of the evaluation.

    Returns:
      A dict for each arm, reference and figure: "arm", "reference", "task" (name of the set),
      "field" (of the column) and the fields of `statistics.Difference`.
    """
    compared = []
    for arm, others in references.items():
        for reference, (name, one) in itertools.product(others, sets.items()):
            sides = (arm, name), (reference, name)
            key = {"arm": arm, "reference": reference, "task": name}
            compared += [key | gap for gap in _gaps(one, outcomes, sides, options)]
    return compared


def of_guards(
    sets: Mapping[str, EvalSet],
    outcomes: Mapping[str, Sequence[dict]],
    options: EvalOptions,
) -> list[dict]:
    """Compares each arm under guards with itself without them.

    Args:
      sets, outcomes, options: as in `differences`.

    Returns:
      As there; the arm is called by its name and that of the guards, the reference by its own.
    """
    compared = []
    for arm, (name, one) in itertools.product(outcomes, sets.items()):
        plain = name.removesuffix(f"@{one.under}")
        if one.under and plain in sets:
            key = {"arm": f"{arm} ({one.under})", "reference": arm, "task": plain}
            sides = (arm, name), (arm, plain)
            compared += [key | gap for gap in _gaps(sets[plain], outcomes, sides, options)]
    return compared


def _gaps(
    one: EvalSet,
    outcomes: Mapping[str, Sequence[dict]],
    sides: Sequence[tuple[str, str]],
    options: EvalOptions,
) -> list[dict]:
    """Returns `field` and difference of each figure between two sides, `(arm, set)` each."""
    if one.task.values is None:
        return []
    values = [
        [one.task.values(outcome[name], options) for outcome in outcomes[arm]]
        for arm, name in sides
    ]
    gaps = []
    for column in one.columns:
        if all(column.field in of_seed for side in values for of_seed in side):
            gap = statistics.paired(
                *([of_seed[column.field] for of_seed in side] for side in values),
                rates=column.unit == "%",
            )
            gaps.append({"field": column.field} | gap._asdict())
    return gaps
