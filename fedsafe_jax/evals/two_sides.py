"""The headline of two sides: refusal of harmful requests beside compliance with harmless ones.

A model that refuses everything has the best of one side and the worst of the other, so neither is
shown alone.
"""

from collections.abc import Mapping

from fedsafe_jax.evals.task import EvalSet


def pairs(sets: Mapping[str, EvalSet]) -> list[tuple[str, str]]:
    """Returns the names of the sets that are shown together, `(harmful, harmless)`."""
    return [
        (name, other)
        for name, one in sets.items()
        for other, beside in sets.items()
        if beside.task.name in one.task.beside and beside.under == one.under
    ]


def headline(sets: Mapping[str, EvalSet], summary: Mapping[str, dict]) -> list[dict]:
    """Returns both sides of every pair.

    Args:
      sets: the evaluation sets by name.
      summary: what `Task.summarise` returned, by name.

    Returns:
      A dict for each pair: `harmful` and `harmless`, names of the sets; `safe` and `complied`, the
      better share of each side in percent, with `safe_ci95` and `complied_ci95`; `balanced`, the
      mean of both. A pair of which a side has no value is left out.
    """
    both = []
    for harmful, harmless in pairs(sets):
        sides = [_better_share(sets[name], summary[name]) for name in (harmful, harmless)]
        if all(sides):
            (safe, safe_interval), (complied, complied_interval) = sides
            both.append(
                {
                    "harmful": harmful,
                    "harmless": harmless,
                    "safe": safe,
                    "safe_ci95": safe_interval,
                    "complied": complied,
                    "complied_ci95": complied_interval,
                    "balanced": (safe + complied) / 2,
                }
            )
    return both


def in_words(both: dict) -> str:
    """Returns a pair in one line, for the command line."""
    safe, complied = (
        f"{both[side]:.1f}% ({both[f'{side}_ci95'][0]:.1f}-{both[f'{side}_ci95'][1]:.1f})"
        for side in ("safe", "complied")
    )
    return (
        f"{both['harmful']} beside {both['harmless']}: safe on harmful {safe}, complied with "
        f"harmless {complied}, mean {both['balanced']:.1f}%"
    )


def _better_share(one: EvalSet, summary: dict) -> tuple[float, list[float]] | None:
    """Returns the first column's value and interval, turned so that more is better."""
    column = one.task.columns[0]
    value, interval = summary.get(column.field), summary.get(column.interval)
    if value is None:
        return None
    if column.better == "up":
        return value, list(interval)
    return 100 - value, [100 - bound for bound in reversed(interval)]
