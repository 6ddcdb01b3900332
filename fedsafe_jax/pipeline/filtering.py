"""From a config to a trained filter, to clients' scores, and to what writes replacements."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from fedsafe_jax.cai import forms
from fedsafe_jax.cai import revise as revise_lib
from fedsafe_jax.data.examples import UNSAFE, Example
from fedsafe_jax.data.refusals import REFUSAL, start_refusal
from fedsafe_jax.filters import actions, cache, classifier, guard, quality, store
from fedsafe_jax.filters.decision import Decision
from fedsafe_jax.filters.pairs import hard_negatives
from fedsafe_jax.filters.store import check_folders
from fedsafe_jax.filters.training import TrainingOptions
from fedsafe_jax.inference import generation
from fedsafe_jax.inference.chat_session import ChatSession
from fedsafe_jax.inference.language_model import LanguageModel, load_pretrained
from fedsafe_jax.models import encoder_hub, lora
from fedsafe_jax.pipeline.clients import Clients, encode
from fedsafe_jax.pipeline.inputs import RunInputs
from fedsafe_jax.runtime import multihost


class Scored(NamedTuple):
    """Verdicts on pairs.

    Attributes:
      probability: calibrated P(unsafe), float32 `[n]`.
      threshold: from which a pair is flagged.
      make_filter: `() -> filter`, trains it when it was not needed so far.
    """

    probability: np.ndarray
    threshold: float
    make_filter: object


def filter_clients(
    config, inputs: RunInputs, clients: Clients, seed: int, workdir: epath.Path, progress
) -> Clients:
    """Trains the filter once, and filters every client's pairs.

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
    scored = score(config, inputs, everything, seed, workdir / "filter_scores")
    filtered, counts, categories = [], [], {}
    for left in apply_action(config, inputs, pairs, scored, seed):
        encoded, _ = encode(inputs.lm.tokenizer, left.examples, config.seq_len, left.weights)
        filtered.append(encoded)
        counts.append(left.counts)
        for name, (flagged, seen) in left.by_category.items():
            before = categories.get(name, (0, 0))
            categories[name] = (before[0] + flagged, before[1] + seen)
    unsafe = [e.label == UNSAFE for e in everything]
    measured = quality.quality(unsafe, scored.probability >= scored.threshold)
    progress.note(
        f"filter: recall {measured.recall:.1f}%, precision {measured.precision:.1f}%, "
        f"threshold {scored.threshold:.2f}"
    )
    return dataclasses.replace(
        clients,
        filtered=filtered,
        counts=counts,
        categories=categories,
        quality=measured,
        reliability=quality.reliability(unsafe, scored.probability),
        auroc=quality.auroc(unsafe, scored.probability),
        threshold=scored.threshold,
        make_filter=scored.make_filter,
    )


def apply_action(config, inputs, pairs, scored: Scored, seed: int) -> list[actions.FilteredPairs]:
    """Applies the action to each client's pairs, which `scored` holds one after another."""
    action = config.filter.action
    rewrite = rewriter(config, inputs, scored, seed) if action == "rewrite" else None
    stops = np.cumsum([len(examples) for examples in pairs])
    by_client = np.split(scored.probability, stops[:-1])
    return [
        actions.apply(action, examples, probability, scored.threshold, rewrite)
        for examples, probability in zip(pairs, by_client, strict=True)
    ]


def describe(f, pairs: int) -> str:
    """What filtering is about to do, for the terminal."""
    if f.kind == "simulated":
        return "simulating a safety filter"
    if f.load or f.unsafe_labels:
        return f"loading the safety filter {f.load or f.encoder}"
    return f"training the safety filter on {pairs} pairs"


def options(f) -> TrainingOptions:
    """Of a config's `filter`."""
    return TrainingOptions(
        f.epochs,
        f.batch_size,
        f.learning_rate,
        patience=f.patience,
        validation_share=f.validation_share,
        target=f.target,
        precision_floor=f.precision_floor,
        unsafe_share=f.unsafe_share,
    )


def make(f, pairs: Sequence[Example], tokenizer, seed: int, dtype: str, targets: Sequence[str]):
    """The filter that a config's `filter` asks for, trained on the server's pairs.

    Args:
      f: the section of the config.
      pairs: labelled; `hard_negatives` are added.
      tokenizer: that a classifier from scratch reads with.
      seed: of training.
      dtype: of a guard's base.
      targets: projections that a guard's adapter changes.

    Returns:
      `(filter, training.Trained or None)`.

    Raises:
      FilterError, ModelError: it cannot be loaded or trained.
    """
    check_folders(f)
    if f.load:
        return store.load(f.load, functools.partial(load_pretrained, dtype=dtype)), None
    pairs = [*pairs, *hard_negatives(pairs, f.hard_negatives, seed)]
    if f.kind in ("guard", "guardian"):
        # Loaded here and let go after filtering: it may be as large as the model itself.
        lm = load_pretrained(f.model, dtype)
        shape = lora.LoraConfig(f.lora_rank, 2.0 * f.lora_rank, tuple(targets))
        replies = None
        if f.kind == "guardian":
            replies = guard.safe_replies(pairs, REFUSAL)
        return guard.train(
            pairs,
            lm,
            shape,
            seed=seed,
            options=options(f),
            max_length=f.max_length,
            replies=replies,
        )
    if f.encoder and f.unsafe_labels:
        return store.from_encoder(f.encoder, f.max_length, tuple(f.unsafe_labels)), None
    start = None
    if f.encoder:
        from transformers import AutoTokenizer

        folder = pathlib.Path(f.encoder)
        config, params = encoder_hub.load_classifier(folder, num_labels=2, seed=seed)
        start = dataclasses.replace(config, dropout=0.1), params
        tokenizer = AutoTokenizer.from_pretrained(folder)
    return classifier.train(
        pairs, tokenizer, seed, options=options(f), max_length=f.max_length, start=start
    )


def score(config, inputs, pairs: Sequence[Example], seed: int, folder: epath.Path) -> Scored:
    """All clients' pairs in one stream; what was scored before is read from `folder`."""
    f = config.filter
    if f.kind == "simulated":
        found = actions.simulated(pairs, f.simulated_recall, f.simulated_precision, [seed, 13])
        return Scored(found, 0.5, None)

    @functools.lru_cache(maxsize=1)
    def make_filter():
        targets = inputs.lora.targets
        return make(
            f,
            inputs.filter_pairs,
            inputs.lm.tokenizer,
            seed=seed,
            dtype=config.dtype,
            targets=targets,
        )[0]

    if f.load or f.unsafe_labels:
        known = cache.folder_hash(f.load or f.encoder)
    else:
        known = [(cache.pair_hash(p), p.label) for p in inputs.filter_pairs]
    trained = {k: v for k, v in f.to_dict().items() if k not in ("action", "threshold")}
    fingerprint = cache.content_hash(trained, seed, config.dtype, known)
    scores = cache.ScoreCache(folder, fingerprint, multihost.is_primary())
    log_odds = scores.log_odds(pairs, make_filter)
    decision = Decision(*scores.decision)
    threshold = f.threshold or decision.threshold
    return Scored(decision.probability(log_odds), threshold, make_filter)


def rewriter(config, inputs, scored: Scored, seed: int):
    """What writes new answers for flagged pairs, `examples -> list of answers`.

    A guardian writes them itself; else the frozen base model criticises and revises the answer it
    was given, as in Constitutional AI.
    """
    if config.filter.kind == "guardian":
        return functools.partial(guardian_replies, scored.make_filter())
    lm = dataclasses.replace(inputs.lm, adapter=None)
    return functools.partial(revised, lm, inputs.constitution, config.cai.max_new_tokens, seed)


def guardian_replies(found, pairs: Sequence[Example], max_new_tokens: int = 64) -> list[str]:
    """What a guardian says behind a verdict of "unsafe", which it is made to give."""
    tokenizer = found.tokenizer
    lead = [guard.verdict_ids(tokenizer)[1]]
    lead += tokenizer("\n", add_special_tokens=False)["input_ids"]
    rows = guard.render_pairs(tokenizer, pairs, found.max_length, found.template)
    (answers,) = generation.generate_ids(
        found.model,
        found.params,
        found.adapter,
        prompts=[[*row, *lead] for row in rows],
        stop_ids=(tokenizer.eos_token_id,),
        max_new_tokens=max_new_tokens,
    )
    return [
        tokenizer.decode(ids, skip_special_tokens=True).strip() if finished else ""
        for ids, finished in zip(answers.ids, answers.finished, strict=True)
    ]


def revised(
    lm: LanguageModel, constitution, max_new_tokens: int, seed: int, pairs: Sequence[Example]
) -> list[str]:
    """Revisions of the pairs' answers by a model; "" where a revision is of no use."""

    def answer(threads, call):
        del threads, call
        return [p.response for p in pairs], np.ones(len(pairs), bool)

    talk = ChatSession(lm)

    def reviser(threads, call):
        del call
        return talk.answer_dialogues(
            [forms.as_chat(t) for t in threads], max_new_tokens, truncate=True
        )

    records = revise_lib.revise(
        [p.prompt for p in pairs],
        constitution,
        answer,
        reviser=reviser,
        seed=[seed, 14],
        rules=revise_lib.Rules([True] * len(pairs), start_refusal),
    )
    return ["" if r.dropped else r.revision for r in records]
