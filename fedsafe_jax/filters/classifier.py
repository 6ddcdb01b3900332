"""Encoder classifier as the clients' safety filter: it reads a (dialogue, response) pair.

The server trains it once, on pairs of its own, and ships it; no client data leaves a client.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedsafe_jax import random_streams
from fedsafe_jax.data.examples import Example
from fedsafe_jax.filters import classifier_file, stream, training
from fedsafe_jax.filters.decision import Decision
from fedsafe_jax.filters.pair_rows import Encoded, PairBatch, encode_pairs, pad
from fedsafe_jax.filters.protocol import FilterError, labelled
from fedsafe_jax.filters.training import TrainingOptions
from fedsafe_jax.models import encoder_hub
from fedsafe_jax.models.encoder import Classifier, EncoderConfig
from fedsafe_jax.models.hub import read_json
from fedsafe_jax.models.hub_files import save_tokenizer
from fedsafe_jax.models.tensor_files import save_file
from fedsafe_jax.models.tokenizer_loading import read_tokenizer
from fedsafe_jax.random_streams import Purpose

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_TOKENS = 4096  # tokens of a scoring batch, padding included
TENSORS = "classifier.safetensors"


class ClassifierFilter(NamedTuple):
    """A trained encoder.

    Attributes:
      config, params: shape and weights of `models.encoder.Classifier`.
      tokenizer: Hugging Face tokenizer that pairs are read with.
      max_length: most tokens of a pair.
      decision: calibration and threshold.
      unsafe_classes: the classes that together mean unsafe.
    """

    config: EncoderConfig
    params: dict
    tokenizer: "PreTrainedTokenizerBase"
    max_length: int
    decision: Decision = Decision()
    unsafe_classes: tuple[int, ...] = (1,)

    @property
    def kind(self) -> str:
        """Name in `kinds.FILTER_KINDS`."""
        return "classifier"

    def log_odds(self, pairs: Sequence[Example]) -> np.ndarray:
        """See `protocol.SafetyFilter`."""
        rows = encode_pairs(self.tokenizer, pairs, self.max_length)
        return _log_odds(self.config, self.unsafe_classes, self.params, rows)

    def score(self, pairs: Sequence[Example]) -> np.ndarray:
        """See `protocol.SafetyFilter`."""
        return self.decision.probability(self.log_odds(pairs))


@functools.partial(jax.jit, static_argnames=("config", "unsafe_classes"))
def batch_log_odds(
    config: EncoderConfig, unsafe_classes: tuple[int, ...], params: dict, batch: PairBatch
) -> jax.Array:
    """Returns the log-odds of the unsafe classes together against the others, float32 `[rows]`."""
    logits = Classifier(config).apply({"params": params}, *batch)
    chance = jax.nn.log_softmax(logits)
    unsafe = jnp.isin(jnp.arange(config.num_labels), jnp.asarray(unsafe_classes))
    worse = jax.nn.logsumexp(jnp.where(unsafe, chance, -jnp.inf), axis=-1)
    return worse - jax.nn.logsumexp(jnp.where(unsafe, -jnp.inf, chance), axis=-1)


def weighted_loss(
    model: Classifier,
    params: dict,
    frozen: tuple,
    batch: PairBatch,
    target: jax.Array,
    weight: jax.Array,
    key: jax.Array,
) -> jax.Array:
    """Returns the weighted mean cross-entropy of a batch, with dropout.

    Args:
      model: the encoder with its head.
      params: its weights.
      frozen: nothing, as all of a classifier is trained.
      batch: `rows` padded pairs.
      target: int32 `[rows]`, 1 for unsafe.
      weight: float32 `[rows]`, 0 for rows that fill the batch.
      key: random key of dropout.
    """
    del frozen
    logits = model.apply({"params": params}, *batch, deterministic=False, rngs={"dropout": key})
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, target)
    return jnp.sum(nll * weight) / jnp.sum(weight)


def _log_odds(
    config: EncoderConfig, unsafe_classes: tuple[int, ...], params: dict, rows: Sequence[Encoded]
) -> np.ndarray:
    """Log-odds of encoded pairs, float32 `[n]`.

    Batches go to this process's devices in turn, and all are dispatched before the first result is
    read, so that no device waits for the host.
    """
    lengths, out = [len(r.ids) for r in rows], np.zeros(len(rows), np.float32)
    devices = jax.local_devices()
    copies = [jax.device_put(params, device) for device in devices]
    waiting = []
    for number, (chosen, width, count) in enumerate(stream.batches(lengths, BATCH_TOKENS)):
        batch = pad([rows[i] for i in chosen], min(width, config.max_length), count)
        turn = number % len(devices)
        batch = jax.device_put(batch, devices[turn])
        scores = batch_log_odds(config, unsafe_classes, copies[turn], batch)
        waiting.append((chosen, scores))
    for chosen, scores in waiting:
        out[chosen] = np.asarray(scores)[: len(chosen)]
    return out


def train(
    examples: Sequence[Example],
    tokenizer: "PreTrainedTokenizerBase",
    seed: int,
    options: TrainingOptions | None = None,
    max_length: int = 128,
    start: tuple[EncoderConfig, dict] | None = None,
) -> tuple[ClassifierFilter, training.Trained]:
    """Trains a classifier with AdamW and cross-entropy, classes weighted to balance.

    Args:
      examples: pairs labelled safe or unsafe; both must occur.
      tokenizer: Hugging Face tokenizer that the pairs are read with.
      seed: seed of initialisation, order and dropout.
      options: see `training.TrainingOptions`.
      max_length: most tokens of a pair.
      start: a pre-trained encoder with a head of two classes, see `encoder_hub.load_classifier`;
        None for a small one from scratch.

    Raises:
      FilterError: one of the labels is missing, or max_length is too short.
    """
    pairs, _ = labelled(examples)
    rows = encode_pairs(tokenizer, pairs, max_length)
    if start is None:
        config = EncoderConfig(len(tokenizer), max_length=max_length)
        batch = pad(rows[:1], max_length, 1)
        key = random_streams.key(Purpose.FILTER_START, seed)
        params = Classifier(config).init(key, *batch)["params"]
    else:
        config, params = start
    network = training.Network(
        [len(r.ids) for r in rows],
        make_batch=lambda chosen, width, count: pad(
            [rows[i] for i in chosen], min(width, config.max_length), count
        ),
        loss_fn=functools.partial(weighted_loss, Classifier(config)),
        log_odds=lambda params, chosen: _log_odds(config, (1,), params, [rows[i] for i in chosen]),
    )
    trained = training.train(pairs, params, network, options or TrainingOptions(), seed)
    classifier = ClassifierFilter(
        config, trained.params, tokenizer, max_length=max_length, decision=trained.decision
    )
    return classifier, trained


def from_encoder(
    folder: str | os.PathLike, max_length: int, unsafe_labels: Sequence[str]
) -> ClassifierFilter:
    """Wraps a Hugging Face classifier as it is, such as one of toxicity.

    Args:
      folder: encoder with a classification head.
      max_length: most tokens of a pair.
      unsafe_labels: names in its `id2label` that mean unsafe.

    Raises:
      FilterError: none of the encoder's labels, or all of them, are named.
    """
    folder = pathlib.Path(folder)
    names = read_json(folder / "config.json").get("id2label", {})
    names = {int(i): name for i, name in names.items()}
    classes = tuple(i for i, name in sorted(names.items()) if name in unsafe_labels)
    unknown = sorted(set(unsafe_labels) - set(names.values()))
    if unknown or not classes or len(classes) == len(names):
        raise FilterError(
            f"filter.unsafe_labels={tuple(unsafe_labels)}: name some, not all, of the labels of "
            f"{folder}: {', '.join(names.values()) or 'it has none'}."
        )
    config, params = encoder_hub.load_classifier(folder)
    return ClassifierFilter(
        config,
        params,
        encoder_hub.load_tokenizer(folder, config),
        max_length=min(max_length, config.max_length),
        unsafe_classes=classes,
    )


def save(classifier: ClassifierFilter, folder: pathlib.Path) -> dict:
    """Writes weights and tokenizer; returns the classifier's fields of `filter.json`."""
    shape = save_encoder(classifier.config, classifier.params, classifier.tokenizer, folder)
    return {"encoder": shape, "unsafe_classes": list(classifier.unsafe_classes)}


def save_encoder(
    config: EncoderConfig,
    params: dict,
    tokenizer: "PreTrainedTokenizerBase",
    folder: pathlib.Path,
) -> dict:
    """Writes weights and tokenizer of an encoder of any number of classes.

    Args:
      config, params: shape and weights.
      tokenizer: tokenizer that it reads with.
      folder: an existing folder.

    Returns:
      The shape, ready for JSON, as `load_encoder` takes it.
    """
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    tensors = {"/".join(k.key for k in path): np.asarray(leaf) for path, leaf in flat}
    save_file(tensors, folder / TENSORS)
    save_tokenizer(tokenizer, folder)
    return {k: v for k, v in dataclasses.asdict(config).items() if k != "platform"}


def load_encoder(
    where: pathlib.Path, shape: dict
) -> tuple[EncoderConfig, dict, "PreTrainedTokenizerBase"]:
    """Reads what `save_encoder` wrote.

    Args:
      where: the JSON file that holds the shape, beside weights and tokenizer.
      shape: what `save_encoder` returned.

    Returns:
      `(config, params, tokenizer)`.

    Raises:
      FilterError: what is there is no classifier, see `classifier_file`.
      ModelError: its weights are not finite, or there is no tokenizer.
    """
    config = classifier_file.encoder_config(shape, where)
    params = classifier_file.tensors(where.with_name(TENSORS), config)
    return config, params, read_tokenizer(where.parent)


def load(folder: pathlib.Path, content: dict, decision: Decision) -> ClassifierFilter:
    """Reads what `save` wrote.

    Args:
      folder: folder of the filter.
      content: the content of `filter.json`.
      decision: calibration and threshold.

    Raises:
      FilterError: what is there is no classifier, see `classifier_file`.
      ModelError: its weights are not finite, or there is no tokenizer.
    """
    where = folder / "filter.json"
    config, params, tokenizer = load_encoder(where, content["encoder"])
    return ClassifierFilter(
        config,
        params,
        tokenizer,
        max_length=classifier_file.pair_length(content["max_length"], where),
        decision=decision,
        unsafe_classes=classifier_file.unsafe_classes(content["unsafe_classes"], config, where),
    )
