"""Kinds of filters: how each is made, stored and read back."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from fedsafe_jax.data.examples import Example
from fedsafe_jax.data.refusals import REFUSAL
from fedsafe_jax.filters import classifier, guard
from fedsafe_jax.filters.classifier import ClassifierFilter
from fedsafe_jax.filters.decision import Decision
from fedsafe_jax.filters.guard import GuardBase, GuardFilter
from fedsafe_jax.filters.simulated import simulate
from fedsafe_jax.filters.training import Trained, TrainingOptions
from fedsafe_jax.models import encoder_hub, lora

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Filter = ClassifierFilter | GuardFilter
LoadModel = Callable[[str], GuardBase]


class FilterSpec(NamedTuple):
    """What a filter is made from, besides the server's pairs.

    Attributes:
      options: options of the training.
      seed: seed of initialisation, order and dropout.
      max_length: most tokens of a pair.
      tokenizer: tokenizer of a classifier from scratch.
      encoder: folder of a classifier's pre-trained encoder; "" for a small one from scratch.
      unsafe_labels: labels of the encoder that mean unsafe; () to train it.
      model: path or Hub id of a guard's language model.
      load_model: loads that model.
      lora: shape of a guard's own adapter.
      answered: pairs with answers that a guardian's own are learned from, where the pairs it is
        trained on have none; () to take those.
    """

    options: TrainingOptions
    seed: int
    max_length: int
    tokenizer: "PreTrainedTokenizerBase"
    encoder: str
    unsafe_labels: tuple[str, ...]
    model: str
    load_model: LoadModel
    lora: lora.LoraConfig
    answered: Sequence[Example] = ()


class FilterKind(NamedTuple):
    """One kind of filter.

    Attributes:
      make: `(pairs, FilterSpec) -> (filter, Trained, or None where nothing was trained)`; None for
        a kind that is not a model.
      save: writes a filter's weights; returns its fields of `filter.json`.
      load: `(folder, content of filter.json, decision, load_model) -> filter`.
      simulate: draws verdicts from the labels, for a kind that is not a model.
      unload: returns a filter without what is as large as a model; the filter itself by default.
      reload: `(what unload returned, load_model) -> filter`.
      needs_model: whether it is built on a language model, named by `filter.model`.
      writes_answers: whether it writes the new answers that the action `rewrite` needs.
    """

    make: Callable[[Sequence[Example], FilterSpec], tuple[Filter, Trained | None]] | None = None
    save: Callable[[Filter, pathlib.Path], dict] | None = None
    load: Callable[[pathlib.Path, dict, Decision, LoadModel | None], Filter] | None = None
    simulate: Callable | None = None
    unload: Callable[[Filter], Filter] = lambda whole: whole
    reload: Callable[[Filter, LoadModel], Filter] = lambda whole, load_model: whole
    needs_model: bool = False
    writes_answers: bool = False


def make_classifier(
    pairs: Sequence[Example], spec: FilterSpec
) -> tuple[ClassifierFilter, Trained | None]:
    """Trains a classifier, from scratch or from `spec.encoder`; reads one that has labels."""
    if spec.encoder and spec.unsafe_labels:
        labels = tuple(spec.unsafe_labels)
        return classifier.from_encoder(spec.encoder, spec.max_length, labels), None
    start, tokenizer = None, spec.tokenizer
    if spec.encoder:
        folder = pathlib.Path(spec.encoder)
        config, params = encoder_hub.load_classifier(folder, num_labels=2, seed=spec.seed)
        start = dataclasses.replace(config, dropout=0.1), params
        tokenizer = encoder_hub.load_tokenizer(folder, config)
    return classifier.train(
        pairs,
        tokenizer,
        spec.seed,
        options=spec.options,
        max_length=spec.max_length,
        start=start,
    )


def make_guard(
    pairs: Sequence[Example], spec: FilterSpec, guardian: bool = False
) -> tuple[GuardFilter, Trained]:
    """Fine-tunes a guard; a guardian also learns to answer."""
    base, answered = spec.load_model(spec.model), spec.answered or pairs
    return guard.train(
        pairs,
        base,
        spec.lora,
        seed=spec.seed,
        options=spec.options,
        max_length=spec.max_length,
        replies=guard.safe_replies(pairs, REFUSAL, answered) if guardian else None,
    )


def load_classifier(
    folder: pathlib.Path, content: dict, decision: Decision, load_model: LoadModel | None
) -> ClassifierFilter:
    """Reads a classifier, which needs no language model."""
    del load_model
    return classifier.load(folder, content, decision)


FILTER_KINDS = {
    "classifier": FilterKind(make_classifier, classifier.save, load_classifier),
    "guard": FilterKind(
        make_guard,
        guard.save,
        guard.load,
        unload=guard.unload,
        reload=guard.reload,
        needs_model=True,
    ),
    "guardian": FilterKind(
        functools.partial(make_guard, guardian=True),
        guard.save,
        functools.partial(guard.load, guardian=True),
        unload=guard.unload,
        reload=guard.reload,
        needs_model=True,
        writes_answers=True,
    ),
    "simulated": FilterKind(simulate=simulate),
}


class FilterOnCall:
    """Makes a filter when it is first called for, and holds no model between two calls.

    A guard may be as large as the model that is trained: whoever calls holds it, and it is freed
    with the caller's last reference. Its adapter is kept, and its base is read again by the next
    call.

    Args:
      make: trains or loads the filter.
      load_model: loads a guard's language model by path or Hub id.
    """

    def __init__(self, make: Callable[[], Filter], load_model: LoadModel):
        self._make, self._load_model = make, load_model
        self._kept: Filter | None = None

    def __call__(self) -> Filter:
        """Returns the filter, whole."""
        if self._kept is not None:
            return FILTER_KINDS[self._kept.kind].reload(self._kept, self._load_model)
        made = self._make()
        self._kept = FILTER_KINDS[made.kind].unload(made)
        return made
