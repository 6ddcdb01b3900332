"""Trains a safety filter on its own, and measures it on pairs it has not seen.

    fedsafe train-filter --config=configs/filter_minilm.py --config.data_dir=DIR \\
        --config.encoder=FOLDER --workdir=DIR
"""

import collections
import dataclasses
import json
import pathlib

import ml_collections
from absl import flags

from fedsafe_jax import own_folder
from fedsafe_jax.cli.command import Command, Config, check_folder
from fedsafe_jax.cli.config_help import filter_fields
from fedsafe_jax.config import filter_config
from fedsafe_jax.data.examples import UNKNOWN, UNSAFE, Example
from fedsafe_jax.filters.decision import AT_BOUND, flag
from fedsafe_jax.filters.protocol import FilterError, SafetyFilter
from fedsafe_jax.filters.quality import shown
from fedsafe_jax.filters.requests import REQUEST, of_pairs
from fedsafe_jax.runtime.libraries import prepare_libraries
from fedsafe_jax.validation import validate_filter
from fedsafe_jax.whole_files import storage


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags."""
    flags.DEFINE_string(
        "workdir", None, "Folder that the filter is written to.", flag_values=values
    )


def read(config: ml_collections.ConfigDict) -> tuple[list[Example], list[Example], dict]:
    """Returns `(training pairs, held-out pairs, counts)`; no dialogue is on both sides.

    Refusals that are labelled unsafe are left out, see `filters.pairs.drop_mislabelled`. At most
    `max_per_source` pairs of each source are trained on. A filter that reads requests is measured
    on them.
    """

    from fedsafe_jax import load_pretrained
    from fedsafe_jax.data import sources
    from fedsafe_jax.evals import judges
    from fedsafe_jax.evals.judges import Tools
    from fedsafe_jax.filters.pairs import drop_mislabelled
    from fedsafe_jax.random_streams import Purpose, generator

    refuses = judges.refuses(config.judge, Tools(load_pretrained))

    def load(name):
        answered, blank = sources.load_answered(name, config.data_dir)
        labelled = [e for e in answered if e.label != UNKNOWN]
        return *drop_mislabelled(labelled, refuses), len(blank)

    held = [e for name in config.heldout_sources for e in load(name)[0]]
    openings = {e.opening for e in held}  # so that no conversation is on both sides
    pairs: list = []
    counts = {"read": 0, "without_answer": 0, "disputed": 0, "in_held_out": 0, "over_limit": 0}
    for number, name in enumerate(config.sources):
        labelled, disputed, blank = load(name)
        counts["read"] += len(labelled) + disputed + blank
        counts["without_answer"] += blank
        counts["disputed"] += disputed
        if not config.heldout_sources:
            mine = [e for e in labelled if sources.part_of(e.opening) == "heldout"]
            held += mine
            openings |= {e.opening for e in mine}
        left = [e for e in labelled if e.opening not in openings]
        counts["in_held_out"] += len(labelled) - len(left)
        rng = generator(Purpose.FILTER_LIMIT, config.seed, number)
        some = rng.permutation(len(left))[: config.max_per_source or None]
        counts["over_limit"] += len(left) - len(some)
        pairs += [left[i] for i in sorted(some)]
    if config.reads == REQUEST:
        held = of_pairs(held, refuses)
        counts["requests"] = len(of_pairs(pairs, refuses))
    return pairs, held, counts | {"trained_on": len(pairs), "held_out": len(held)}


def measure(safety_filter: SafetyFilter, held: list[Example], share: float, seed: int) -> dict:
    """Measures a filter on held-out pairs, in all and by source.

    Args:
      safety_filter: the filter.
      held: pairs it was not trained on.
      share: share of unsafe pairs to which `held` is resampled; 0 takes all as they are.
      seed: seed of the resampling.

    Returns:
      Rates in percent, the area under the ROC curve, calibration, and flagged pairs by source.
      None for a rate that is not defined, as all pairs have one label.
    """
    import numpy as np

    from fedsafe_jax.filters import quality

    probability = safety_filter.score(held)
    unsafe = np.array([e.label == UNSAFE for e in held], bool)
    if share and unsafe.any() and not unsafe.all():
        chosen = quality.resample(unsafe, share, seed)
    else:
        chosen = np.arange(len(held))
    p, y = probability[chosen], unsafe[chosen]
    flagged = flag(p, safety_filter.decision.threshold)
    by_source = collections.defaultdict(list)
    for i, verdict in zip(chosen, flagged, strict=True):
        by_source[f"{held[i].source}/{held[i].label}"].append(bool(verdict))
    rates = quality.quality(y, flagged)._asdict() | {"auroc": quality.auroc(y, p)}
    if y.all() or not y.any():  # not defined where all have one label
        rates |= dict.fromkeys(("precision", "recall", "hmean", "auroc"))
    return (
        rates
        | {"pairs": len(chosen), "unsafe_share": float(y.mean()) if len(y) else 0.0}
        | {"calibration": quality.reliability(y, p)._asdict()}
        | {"flagged_by_source": {k: [sum(v), len(v)] for k, v in sorted(by_source.items())}}
    )


def train(config: ml_collections.ConfigDict, workdir: str) -> dict:
    """Trains, saves and measures a filter; returns what `filter_results.json` holds.

    Raises:
      FilterError: the config names a filter that cannot be trained.
    """
    from fedsafe_jax.federated.mesh import make_mesh
    from fedsafe_jax.filters import store
    from fedsafe_jax.filters.kinds import FILTER_KINDS
    from fedsafe_jax.models import lora
    from fedsafe_jax.models.base_model import model_folder
    from fedsafe_jax.models.tokenizer_loading import read_tokenizer
    from fedsafe_jax.pipeline import filtering
    from fedsafe_jax.runtime import devices
    from fedsafe_jax.runtime.run_files import write_json

    if FILTER_KINDS[config.kind].make is None:
        raise FilterError(f"filter.kind='{config.kind}' is no filter that could be trained.")
    pairs, held, counts = read(config)
    tokenizer = read_tokenizer(model_folder(config.tokenizer))
    targets = lora.expand_targets(config.lora_targets)
    mesh = make_mesh(model_parallel=config.model_parallel)
    devices.announce()
    safety_filter, trained = filtering.build_filter(
        config,
        pairs,
        tokenizer,
        seed=config.seed,
        load_model=filtering.guard_loader(config, mesh),
        targets=targets,
    )
    with storage(workdir):
        store.save(safety_filter, workdir, config.reads)
    results = {"counts": counts, "decision": dataclasses.asdict(safety_filter.decision)}
    if trained is not None:
        results |= {"epochs": [e._asdict() for e in trained.epochs], "best_epoch": trained.best}
    if held:
        results |= {"heldout": measure(safety_filter, held, config.unsafe_share, config.seed)}
    write_json(pathlib.Path(workdir) / "filter_results.json", results)
    return results


def main(values: flags.FlagValues) -> None:
    """Trains and prints the counts, the epochs, the decision and the measured quality."""
    validate_filter(values.config)
    check_folder("workdir", values.workdir)
    own_folder.claim_workdir(values.workdir)
    prepare_libraries(values.workdir)
    results = train(values.config, values.workdir)
    print(f"pairs: {json.dumps(results['counts'])}")
    for i, epoch in enumerate(results.get("epochs", ())):
        mark = " (kept)" if i == results["best_epoch"] else ""
        print(f"epoch {i + 1}: loss {epoch['loss']:.3f}, AUROC {shown(epoch['auroc'], 3)}{mark}")
    decision = results["decision"]
    names = ("temperature", "threshold", "bias")
    print(", ".join(f"{name} {decision[name]:.2f}" for name in names))
    if decision["at_bound"]:
        print(f"warning: {AT_BOUND}")
    if "heldout" in results:
        print_quality(results["heldout"])
    print(f"filter: {values.workdir}")


def print_quality(q: dict) -> None:
    """Prints the rates that `measure` returns."""
    print(
        f"held out: {q['pairs']} pairs, {100 * q['unsafe_share']:.0f}% unsafe: AUROC "
        f"{shown(q['auroc'], 3)}, precision {shown(q['precision'])}, recall {shown(q['recall'])}, "
        f"harmonic mean {shown(q['hmean'])}, accuracy {shown(q['accuracy'])}, calibration error "
        f"{q['calibration']['error']:.3f}"
    )
    for name, (flagged, seen) in q["flagged_by_source"].items():
        print(f"  {name}: {flagged} of {seen} flagged")


COMMAND = Command(
    define_flags,
    main,
    required=("workdir",),
    config=Config(filter_config, filter_fields, "configs/filter_minilm.py"),
)
