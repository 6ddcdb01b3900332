"""What a run has found: `results.json`, the report and the table in the terminal."""

import time
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from fedsafe_jax.evals import calibration, comparison, two_sides
from fedsafe_jax.evals.task import HELDOUT
from fedsafe_jax.pipeline import evaluation, harm_by_client, rounds
from fedsafe_jax.pipeline.arms import planned_arms, references
from fedsafe_jax.pipeline.clients import Holdings
from fedsafe_jax.pipeline.inputs import RunInputs
from fedsafe_jax.pipeline.workdir import HASH
from fedsafe_jax.report import page
from fedsafe_jax.report.table import print_table
from fedsafe_jax.runtime import fingerprints, ledger, provenance, run_files
from fedsafe_jax.runtime.libraries import versions
from fedsafe_jax.runtime.progress import Progress

FILTER_RATES = ("accuracy", "precision", "recall", "hmean", "auroc")


def write(
    config: ConfigDict,
    inputs: RunInputs,
    workdir: epath.Path,
    *,
    outcomes: dict[str, list[dict]],
    filter_quality: Sequence[dict],
    holdings: Sequence[Holdings],
    progress: Progress,
    started: float,
) -> dict:
    """Writes `results.json` and the report, and prints the table; the first process calls this.

    Args:
      config, inputs, workdir, progress: those of the run.
      outcomes: outcomes by task of each seed, by the id of the arm.
      filter_quality: how well the filter does, by seed; empty without one.
      holdings: what clients hold, by seed; empty where their labels are not known.
      started: `time.monotonic()` when this process began.

    Returns:
      The content of `results.json`.

    Raises:
      StorageError: the storage does not take a file.
    """
    results = summarise(config, inputs, outcomes, filter_quality=filter_quality, holdings=holdings)
    if config.federated.attribution:
        lines = run_files.read_lines(workdir / "metrics.jsonl", run_files.OF_A_ROUND)
        results["attribution"] = harm_by_client.summarise(lines)
    results["inputs"] = {"model": config.model, "sha256": fingerprints.hashes(workdir)}
    results["seconds"] = {"this_process": time.monotonic() - started}
    results["made_by"] = provenance.describe()
    ends = ledger.heads(ledger.read(workdir))
    results[ledger.KEY] = {"heads": ends, "results": ledger.of_results(results)}
    run_files.write_json(workdir / "results.json", results)
    page.write(workdir, config.to_dict(), results, outcomes=outcomes, sets=inputs.evals)
    progress.end()
    print_table(results, inputs.evals)
    return results


def summarise(
    config: ConfigDict,
    inputs: RunInputs,
    outcomes: dict[str, list[dict]],
    filter_quality: Sequence[dict],
    holdings: Sequence[Holdings],
) -> dict:
    """Returns the content of `results.json`; arguments as in `write`."""
    options = evaluation.options_of(config)
    arms = {
        planned.id: {"algorithm": planned.algorithm}
        | evaluation.summarise(inputs.evals, outcomes[planned.id], options)
        for planned in planned_arms(config)
    }
    for planned in planned_arms(config):
        if planned.arm.trains:  # by seed: a score is about the adapter that it stands beside
            arms[planned.id][HASH] = [outcome[HASH] for outcome in outcomes[planned.id]]
    measured = evaluation.measured_judges(config, options)
    for arm in arms.values():
        for name, one in inputs.evals.items():
            corrected = calibration.corrections(arm[name], one.task.columns[0].field, measured)
            arm[name] |= {"corrected": corrected} if corrected else {}
    both_sides = {name: two_sides.headline(inputs.evals, arm) for name, arm in arms.items()}
    differences = comparison.differences(inputs.evals, outcomes, references(config), options)
    differences += comparison.of_guards(inputs.evals, outcomes, options)
    read = {n: one.source for n, one in inputs.evals.items() if one.source != HELDOUT}
    task_versions = {name: one.task.version for name, one in inputs.evals.items()}
    results = {
        "arms": arms,
        "two_sides": both_sides,
        "differences": differences,
        "seeds": list(config.seeds),
        "data": inputs.counts | held(holdings),
        "calibration": calibration.table(measured),
        "sources": read,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": versions() | {"tasks": task_versions},
    }
    if guards := evaluation.guard_spec(config).label:
        results["guards"] = guards
    if evaluation.is_triggered(config):
        results["triggered"] = True
    if private := rounds.privacy_of(config):
        results["privacy"] = private
    if filter_quality:
        mean = {n: _mean_of_defined([q[n] for q in filter_quality]) for n in FILTER_RATES}
        results["filter"] = mean | {"per_seed": list(filter_quality)}
    return results


def held(holdings: Sequence[Holdings]) -> dict:
    """Returns what `results.json` says of the clients' pairs, a value a seed.

    Before any filter; the shares are null of those without pairs, and nothing is said of real
    sites, whose labels are not known.
    """
    if not holdings:
        return {}
    return {
        "pairs_held": [sum(h.pairs) for h in holdings],
        "pairs_by_client": [list(h.pairs) for h in holdings],
        "harmful_share_held": [h.harmful_share for h in holdings],
        "harmful_share_by_client": [h.by_client for h in holdings],
        "pairs_lost": [h.lost for h in holdings],
        "notes": [h.notes for h in holdings],
    }


def _mean_of_defined(values: list[float | None]) -> float | None:
    """Returns the mean of the seeds in which a rate is defined, None where it is in none."""
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None
