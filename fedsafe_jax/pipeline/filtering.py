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
from fedsafe_jax.data.sources import SAFE, UNSAFE, Example
from fedsafe_jax.evals.judges import start_refusal
from fedsafe_jax.filters import actions, cache, classifier, guard, store
from fedsafe_jax.filters.decision import Decision
from fedsafe_jax.filters.training import TrainingOptions
from fedsafe_jax.inference import generation
from fedsafe_jax.inference.chat_session import Conversation
from fedsafe_jax.inference.language_model import LanguageModel, load_pretrained
from fedsafe_jax.models import encoder_hub, lora
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


def undisputed(pairs: Sequence[Example]) -> tuple[list[Example], int]:
    """Pairs for training and measuring a filter, with the number that was left out.

    An answer that is labelled unsafe and begins as a refusal is left out: either it is a refusal,
    which is safe, or it goes on to comply ("Sorry! Here it is: ..."), and words do not tell which.
    """
    kept = [p for p in pairs if p.label != UNSAFE or not start_refusal(p.response)]
    return kept, len(pairs) - len(kept)


def hard_negatives(pairs: Sequence[Example], share: float, seed: int) -> list[Example]:
    """Refusals to the questions of harmful pairs, labelled safe.

    Without them a filter can tell most harmful pairs by the question, and flags a refusal to it as
    well: then the very answers that keep a model safe are lost.

    Args:
      pairs: labelled ones.
      share: of the unsafe pairs that get such a twin.
      seed: of which, and of their refusals.

    Returns:
      The twins alone. Their answers are the refusals among the pairs, or one of the package.
    """
    rng = np.random.default_rng([seed, 19])
    refusals = sorted({p.response for p in pairs if p.label == SAFE and start_refusal(p.response)})
    refusals = refusals or [actions.REFUSAL]
    unsafe = [p for p in pairs if p.label == UNSAFE]
    chosen = sorted(rng.permutation(len(unsafe))[: round(share * len(unsafe))].tolist())
    said = rng.integers(len(refusals), size=len(chosen))
    return [
        unsafe[i]._replace(response=refusals[j], label=SAFE)
        for i, j in zip(chosen, said, strict=True)
    ]


def answer_risk(found):
    """`(prompts, answers) -> P(unsafe)` by a filter, for `cai.revise.Judge`."""

    def unsafe(prompts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        pairs = zip(prompts, answers, strict=True)
        return found.score([Example((("user", p),), a) for p, a in pairs])

    return unsafe


def describe(f, pairs: int) -> str:
    """What filtering is about to do, for the terminal."""
    if f.kind == "simulated":
        return "simulating a safety filter"
    if f.load or f.unsafe_labels:
        return f"loading the safety filter {f.load or f.encoder}"
    return f"training the safety filter on {pairs} pairs"


def check_folders(f) -> None:
    """Raises `FilterError` where a folder that a config's `filter` names holds none."""
    if f.load:
        store.check(f.load)
    elif f.encoder:
        store.check_encoder(f.encoder)


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
            replies = guard.safe_replies(pairs, actions.REFUSAL)
        return guard.train(pairs, lm, shape, seed, options(f), f.max_length, replies)
    if f.encoder and f.unsafe_labels:
        return store.from_encoder(f.encoder, f.max_length, tuple(f.unsafe_labels)), None
    start = None
    if f.encoder:
        from transformers import AutoTokenizer

        folder = pathlib.Path(f.encoder)
        config, params = encoder_hub.load_classifier(folder, num_labels=2, seed=seed)
        start = dataclasses.replace(config, dropout=0.1), params
        tokenizer = AutoTokenizer.from_pretrained(folder)
    return classifier.train(pairs, tokenizer, seed, options(f), f.max_length, start)


def score(config, world, pairs: Sequence[Example], seed: int, folder: epath.Path) -> Scored:
    """All clients' pairs in one stream; what was scored before is read from `folder`."""
    f = config.filter
    if f.kind == "simulated":
        found = actions.simulated(pairs, f.simulated_recall, f.simulated_precision, [seed, 13])
        return Scored(found, 0.5, None)

    @functools.lru_cache(maxsize=1)
    def make_filter():
        targets = world.lora.targets
        return make(f, world.filter_pairs, world.lm.tokenizer, seed, config.dtype, targets)[0]

    if f.load or f.unsafe_labels:
        known = cache.folder_hash(f.load or f.encoder)
    else:
        known = [(cache.pair_hash(p), p.label) for p in world.filter_pairs]
    trained = {k: v for k, v in f.to_dict().items() if k not in ("action", "threshold")}
    fingerprint = cache.content_hash(trained, seed, config.dtype, known)
    scores = cache.ScoreCache(folder, fingerprint, multihost.is_first())
    log_odds = scores.log_odds(pairs, make_filter)
    decision = Decision(*scores.decision)
    threshold = f.threshold or decision.threshold
    return Scored(decision.probability(log_odds), threshold, make_filter)


def rewriter(config, world, scored: Scored, seed: int):
    """What writes new answers for flagged pairs, `examples -> list of answers`.

    A guardian writes them itself; else the frozen base model criticises and revises the answer it
    was given, as in Constitutional AI.
    """
    if config.filter.kind == "guardian":
        return functools.partial(guardian_replies, scored.make_filter())
    lm = dataclasses.replace(world.lm, adapter=None)
    return functools.partial(revised, lm, world.constitution, config.cai.max_new_tokens, seed)


def guardian_replies(found, pairs: Sequence[Example], max_new_tokens: int = 64) -> list[str]:
    """What a guardian says behind a verdict of "unsafe", which it is made to give."""
    tokenizer = found.tokenizer
    lead = [guard.verdict_ids(tokenizer)[1]]
    lead += tokenizer("\n", add_special_tokens=False)["input_ids"]
    rows = guard.render_pairs(tokenizer, pairs, found.max_length, found.template)
    (answers,) = generation.generate_ids(
        found.model, found.params, found.adapter, [[*row, *lead] for row in rows],
        (tokenizer.eos_token_id,), max_new_tokens,
    )  # fmt: skip
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

    talk = Conversation(lm)

    def reviser(threads, call):
        del call
        return talk.answer_dialogues([forms.as_chat(t) for t in threads], max_new_tokens, cut=True)

    records = revise_lib.revise(
        [p.prompt for p in pairs], constitution, answer, reviser, [seed, 14],
        rules=revise_lib.Rules([True] * len(pairs), start_refusal),
    )  # fmt: skip
    return ["" if r.dropped else r.revision for r in records]
