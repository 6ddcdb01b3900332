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
            if one.task.values is None:
                continue
            sides = [
                [one.task.values(outcome[name], options) for outcome in outcomes[side]]
                for side in (arm, reference)
            ]
            for column in one.columns:
                if all(column.field in values for side in sides for values in side):
                    gap = statistics.paired(
                        *([values[column.field] for values in side] for side in sides),
                        rates=column.unit == "%",
                    )
                    key = {"arm": arm, "reference": reference, "task": name, "field": column.field}
                    compared.append(key | gap._asdict())
    return compared
