"""The model card of an export."""

from collections.abc import Mapping

from fedsafe_jax.evals.task import EvalSet
from fedsafe_jax.report.rendering import render


def text(arm_id: str, settings: dict, summary: dict, sets: Mapping[str, EvalSet]) -> str:
    """Returns a model card that states base, data, arm and scores.

    Args:
      arm_id: key of the arm in `results.json`.
      settings: the run's config, as in `config.json`.
      summary: the arm's part of `results.json`.
      sets: the evaluation sets by name.
    """
    rows = [
        (column.label, cell)
        for name, one in sets.items()
        for column in one.columns
        if (cell := column.cell(summary.get(name, {})))
    ]
    sources = [*settings["safe_sources"], *settings["unsafe_sources"]]
    return render("model_card.md", arm_id=arm_id, settings=settings, rows=rows, sources=sources)
