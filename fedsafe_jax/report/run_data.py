"""What the sections of a report read."""

from collections.abc import Mapping
from typing import NamedTuple

from etils import epath

from fedsafe_jax.evals.task import EvalSet


class RunData(NamedTuple):
    """A finished run.

    Attributes:
      workdir: the run's folder.
      config: the run's config, as in `config.json`.
      results: content of `results.json`.
      outcomes: outcomes of every item by arm and seed.
      sets: the evaluation sets by name.
      rows: lines of `metrics.jsonl`.
    """

    workdir: epath.Path
    config: dict
    results: dict
    outcomes: dict[str, list[dict]]
    sets: Mapping[str, EvalSet]
    rows: list[dict]

    @property
    def figures(self) -> epath.Path:
        """The folder of the figures."""
        return self.workdir / "figures"
