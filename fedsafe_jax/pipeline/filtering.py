"""Filtering of the clients' pairs: makes the filter, scores the pairs, applies the action."""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fedsafe_jax.data.examples import UNSAFE, Example
from fedsafe_jax.evals import judges
from fedsafe_jax.evals.judges import Tools
from fedsafe_jax.filters import cache, quality, requests, store
from fedsafe_jax.filters.actions import ACTIONS, FilteredPairs, apply
from fedsafe_jax.filters.decision import AT_BOUND, flag
from fedsafe_jax.filters.kinds import (
    FILTER_KINDS,
    Filter,
    FilterOnCall,
    FilterSpec,
    LoadModel,
)
from fedsafe_jax.filters.pairs import hard_negatives
from fedsafe_jax.filters.training import Trained, TrainingOptions
from fedsafe_jax.inference.language_model import LanguageModel
from fedsafe_jax.inference.pretrained import load_pretrained
from fedsafe_jax.models import lora
from fedsafe_jax.models.sharding import one_copy
from fedsafe_jax.pipeline.clients import Clients, describe_encoding, encode, learned
from fedsafe_jax.pipeline.inputs import RunInputs
from fedsafe_jax.pipeline.new_answers import answer_writer
from fedsafe_jax.runtime import multihost
from fedsafe_jax.runtime.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Verdicts(NamedTuple):
    """Verdicts of the filter on pairs.

    Attributes:
      probability: calibrated P(unsafe), float32 `[n]`.
      threshold: P(unsafe) from which a pair is flagged.
      make_filter: returns the filter, trained when it was not needed so far; None for a simulated
        one. Whoever calls it holds a guard's model, see `kinds.FilterOnCall`.
      at_bound: see `decision.Decision`.
    """

    probability: np.ndarray
    threshold: float
    make_filter: Callable[[], Filter] | None
    at_bound: bool = False


def filter_clients(
    config: ConfigDict,
    inputs: RunInputs,
    clients: Clients,
    seed: int,
    workdir: epath.Path,
    progress: Progress,
) -> Clients:
    """Makes the filter once, and filters every client's pairs.

    Args:
      config, inputs: config and inputs of the run.
      clients: clients of the seed, as `clients.build` returned them.
      seed: seed of the run.
      workdir: folder of the run; scores are kept below it.
      progress: told what is going on.

    Returns:
      `clients` with the fields that a filter fills.
    """
    pairs = inputs.clients[seed]
    progress.note(f"seed {seed}: {describe(config.filter, len(inputs.filter_pairs))}")
    everything = [e for examples in pairs for e in examples]
    verdicts = score_pairs(config, inputs, everything, seed, workdir / "filter_scores")
    filtered, counts, flagged_of, categories, rejected, lost = [], [], [], {}, [], 0
    for left in apply_action(config, inputs, pairs, verdicts, seed):
        encoded, missing = encode(
            inputs.lm.tokenizer,
            left.examples,
            config.seq_len,
            left.weights,
            refusal_word=config.cai.refusal_word,
        )
        filtered.append(encoded)
        lost += missing
        counts.append(left.counts)
        flagged_of.append(left.flagged)
        rejected.append(left.rejected)
        for name, (flagged, seen) in left.by_category.items():
            before = categories.get(name, (0, 0))
            categories[name] = (before[0] + flagged, before[1] + seen)
    unsafe = [e.label == UNSAFE for e in everything]
    measured = quality.quality(unsafe, flag(verdicts.probability, verdicts.threshold))
    progress.note(
        f"filter: recall {quality.shown(measured.recall)}%, precision "
        f"{quality.shown(measured.precision)}%, threshold {verdicts.threshold:.2f}"
    )
    if said := describe_rejected(rejected):
        progress.note(f"seed {seed}: {said}")
    for line in describe_encoding([e for own in filtered for e in own], lost, "filtered pairs"):
        progress.note(f"seed {seed}: {line}")
    if verdicts.at_bound:
        progress.warn(f"seed {seed}: {AT_BOUND}")
    if masked := [i for i, own in enumerate(filtered) if own and not learned(own)]:
        progress.note(
            f"filter: clients {', '.join(map(str, masked))} weigh 0, all of their pairs are masked"
        )
    return dataclasses.replace(
        clients,
        filtered=filtered,
        counts=counts,
        flagged=flagged_of,
        rejected=rejected,
        categories=categories,
        quality=measured,
        reliability=quality.reliability(unsafe, verdicts.probability),
        auroc=quality.auroc(unsafe, verdicts.probability),
        threshold=verdicts.threshold,
        at_bound=verdicts.at_bound,
        make_filter=verdicts.make_filter,
    )


def describe(section: ConfigDict, num_pairs: int) -> str:
    """Says what filtering is about to do, for the terminal.

    Args:
      section: the config's `filter`.
      num_pairs: number of the server's pairs to train on.
    """
    if FILTER_KINDS[section.kind].simulate:
        return "simulating a safety filter"
    if section.load or section.unsafe_labels:
        return f"loading the safety filter {section.load or section.encoder}"
    return f"training the safety filter on {num_pairs} pairs"


def describe_rejected(rejected: Sequence[Mapping[str, int]]) -> str:
    """Says why new answers were not taken, "" where nothing says why, for the terminal.

    Args:
      rejected: `FilteredPairs.rejected` by client.
    """
    total = sum(map(collections.Counter, rejected), collections.Counter())
    reasons = ", ".join(f"{n} {name}" for name, n in total.most_common())
    return f"new answers to flagged pairs that were not taken: {reasons}" if reasons else ""


def guard_loader(config: ConfigDict, mesh: Mesh | None) -> LoadModel:
    """Returns the function that loads a guard's language model, laid out as the base of a run.

    Args:
      config: its `dtype`, `quantization`, `remat` and `date` are those of the guard.
      mesh: devices; the guard is split over those that hold one copy of the base.
    """
    devices = one_copy(mesh)

    def load_model(name: str, chat_template: str | None = None) -> LanguageModel:
        lm = load_pretrained(
            name,
            config.dtype,
            config.quantization,
            mesh=devices,
            chat_template=chat_template,
            date=config.get("date"),
        )
        return dataclasses.replace(lm, config=dataclasses.replace(lm.config, remat=config.remat))

    return load_model


def build_filter(
    section: ConfigDict,
    pairs: Sequence[Example],
    tokenizer: "PreTrainedTokenizerBase",
    seed: int,
    load_model: LoadModel,
    targets: Sequence[str],
) -> tuple[Filter, Trained | None]:
    """Builds the filter that a config's `filter` asks for, trained on the server's pairs.

    Args:
      section: the config's `filter`.
      pairs: labelled pairs; `hard_negatives` are added, unless it reads requests alone.
      tokenizer: tokenizer of a classifier from scratch.
      seed: seed of the training.
      load_model: loads a guard's language model, see `guard_loader`.
      targets: projections that a guard's adapter changes.

    Returns:
      The filter, and what its training gave; None where it was not trained.

    Raises:
      FilterError, ModelError: it cannot be loaded or trained.
    """
    store.check_folders(section.load, section.encoder)
    if section.load:
        return store.load(section.load, load_model), None
    spec = FilterSpec(
        options=training_options(section),
        seed=seed,
        max_length=section.max_length,
        tokenizer=tokenizer,
        encoder=section.encoder,
        unsafe_labels=tuple(section.unsafe_labels),
        model=section.model,
        load_model=load_model,
        lora=lora.LoraConfig(section.lora_rank, 2.0 * section.lora_rank, tuple(targets)),
    )
    refuses = judges.refuses(section.judge, Tools(load_model))
    make = FILTER_KINDS[section.kind].make
    if section.get("reads", requests.PAIR) == requests.REQUEST:
        return make(requests.of_pairs(pairs, refuses), spec._replace(answered=pairs))
    pairs = [*pairs, *hard_negatives(pairs, section.hard_negatives, seed, refuses)]
    return make(pairs, spec)


def training_options(section: ConfigDict) -> TrainingOptions:
    """Reads the training options of a config's `filter`."""
    return TrainingOptions(
        epochs=section.epochs,
        batch_size=section.batch_size,
        learning_rate=section.learning_rate,
        patience=section.patience,
        validation_share=section.validation_share,
        target=section.target,
        precision_floor=section.precision_floor,
        unsafe_share=section.unsafe_share,
    )


def score_pairs(
    config: ConfigDict, inputs: RunInputs, pairs: Sequence[Example], seed: int, folder: epath.Path
) -> Verdicts:
    """Scores all clients' pairs as one stream.

    Args:
      config, inputs: config and inputs of the run.
      pairs: pairs of all clients.
      seed: seed of the run.
      folder: scores are kept here, and pairs whose score is here are not scored again.
    """
    section = config.filter
    kind = FILTER_KINDS[section.kind]
    if kind.simulate:
        probability = kind.simulate(
            pairs, section.simulated_recall, section.simulated_precision, seed
        )
        return Verdicts(probability, 0.5, None)

    load_model = guard_loader(config, inputs.lm.mesh)

    def make() -> Filter:
        safety_filter, _ = build_filter(
            section,
            inputs.filter_pairs,
            inputs.lm.tokenizer,
            seed=seed,
            load_model=load_model,
            targets=inputs.lora.targets,
        )
        return safety_filter

    make_filter = FilterOnCall(make, load_model)
    fingerprint = _fingerprint(config, inputs, seed)
    scores = cache.ScoreCache(folder, fingerprint, multihost.is_primary())
    log_odds = scores.log_odds(pairs, make_filter)
    decision = scores.decision
    threshold = section.threshold or decision.threshold
    # What is flagged decides what is generated and trained, which must be the same everywhere.
    probability, threshold = multihost.broadcast((decision.probability(log_odds), threshold))
    return Verdicts(probability, float(threshold), make_filter, decision.at_bound)


def _fingerprint(config: ConfigDict, inputs: RunInputs, seed: int) -> str:
    """Hash of everything that a filter's scores depend on."""
    section = config.filter
    if section.load or section.unsafe_labels:
        source = cache.folder_hash(section.load or section.encoder)
    else:
        source = [(cache.pair_hash(p), p.label) for p in inputs.filter_pairs]
    # Raw scores are stored, so what is decided from them later may change.
    later = ("action", "threshold", "rewrite", "instruction")
    fields = {k: v for k, v in section.to_dict().items() if k not in later}
    return cache.content_hash(fields, seed, config.dtype, config.quantization, source)


def apply_action(
    config: ConfigDict,
    inputs: RunInputs,
    pairs: Sequence[Sequence[Example]],
    verdicts: Verdicts,
    seed: int,
) -> list[FilteredPairs]:
    """Applies the action to each client's pairs.

    Args:
      config, inputs: config and inputs of the run.
      pairs: pairs by client.
      verdicts: verdicts on the pairs of all clients, one client after another.
      seed: seed of the run.
    """
    action, write_answers = config.filter.action, None
    if ACTIONS[action].needs_answers:
        write_answers = answer_writer(
            config, inputs, verdicts.make_filter, threshold=verdicts.threshold, seed=seed
        )
    stops = np.cumsum([len(examples) for examples in pairs])
    by_client = np.split(verdicts.probability, stops[:-1])
    return [
        apply(action, examples, probability, verdicts.threshold, write_answers)
        for examples, probability in zip(pairs, by_client, strict=True)
    ]
