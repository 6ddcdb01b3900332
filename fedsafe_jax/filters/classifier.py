"""The clients' safety filter: an encoder that reads a (request, response) pair.

The server trains it once, on pairs of its own, and ships it; no client data leaves a client.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedsafe_jax.data.sources import SAFE, UNSAFE, Example
from fedsafe_jax.models.encoder import Classifier, EncoderConfig


class FilterError(ValueError):
    """The filter cannot be trained, or cannot read pairs, as configured."""


class SafetyFilter(NamedTuple):
    """A trained classifier; class 1 is unsafe."""

    config: EncoderConfig
    params: dict
    tokenizer: object


class FilterQuality(NamedTuple):
    """Detection of unsafe pairs, and the confusion counts behind it."""

    accuracy: float
    precision: float
    recall: float
    hmean: float
    true_positive: int
    false_positive: int
    true_negative: int
    false_negative: int


def encode_pairs(tokenizer, examples: Sequence[Example], max_length: int):
    """Token arrays of pairs: the end of the request, then the beginning of the response.

    Returns:
      `(tokens int32, segments int32, valid bool)`, each `[n, max_length]`.
    """
    half = max_length // 2
    shape = (len(examples), max_length)
    tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    valid = np.zeros(shape, bool)
    for i, example in enumerate(examples):
        request = tokenizer(example.prompt, add_special_tokens=False)["input_ids"][-half:]
        response = tokenizer(example.response, add_special_tokens=False)["input_ids"]
        response = response[: max_length - len(request)]
        end = len(request) + len(response)
        tokens[i, :end] = request + response
        segments[i, len(request) : end] = 1
        valid[i, :end] = True
    return tokens, segments, valid


def train(
    examples: Sequence[Example],
    tokenizer,
    seed: int,
    epochs: int = 5,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    max_length: int = 128,
) -> SafetyFilter:
    """Trains the filter with AdamW and cross-entropy, classes weighted to balance.

    Args:
      examples: pairs labelled safe or unsafe; both must occur.
      tokenizer: Hugging Face tokenizer that the pairs are read with.
      seed: of initialisation, order and dropout.
      epochs: passes over the data (the paper uses 5).
      batch_size: pairs a step.
      learning_rate: peak of a linear decay.
      max_length: tokens of a pair.

    Raises:
      FilterError: one of the labels is missing.
    """
    labelled = [e for e in examples if e.label in (SAFE, UNSAFE)]
    labels = np.array([e.label == UNSAFE for e in labelled], np.int32)
    if len(set(labels.tolist())) < 2:
        raise FilterError("filter data: needs both safe and unsafe pairs; one of them is missing.")
    arrays = encode_pairs(tokenizer, labelled, max_length)
    config = EncoderConfig(len(tokenizer), max_length=max_length)
    model = Classifier(config)
    key = jax.random.key(seed)
    params = model.init(key, *(a[:1] for a in arrays))["params"]
    steps_per_epoch = -(-len(labelled) // batch_size)
    schedule = optax.linear_schedule(learning_rate, 0.0, epochs * steps_per_epoch)
    optimizer = optax.adamw(schedule, weight_decay=0.01)
    state = optimizer.init(params)
    balance = jnp.asarray(len(labels) / (2 * np.bincount(labels)), jnp.float32)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch, target, weight, key):
        def loss_fn(params):
            rngs = {"dropout": key}
            logits = model.apply({"params": params}, *batch, deterministic=False, rngs=rngs)
            nll = optax.softmax_cross_entropy_with_integer_labels(logits, target)
            return jnp.sum(nll * weight) / jnp.sum(weight)

        updates, state = optimizer.update(jax.grad(loss_fn)(params), state, params)
        return optax.apply_updates(params, updates), state

    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(labelled))
        for number in range(steps_per_epoch):
            # The last batch is filled up from the start of the order.
            chosen = np.resize(order[number * batch_size : (number + 1) * batch_size], batch_size)
            step_key = jax.random.fold_in(jax.random.fold_in(key, epoch), number)
            target = labels[chosen]
            batch = tuple(a[chosen] for a in arrays)
            params, state = step(params, state, batch, target, balance[target], step_key)
    return SafetyFilter(config, params, tokenizer)


@functools.partial(jax.jit, static_argnames="config")
def _probability(config, params, tokens, segments, valid):
    logits = Classifier(config).apply({"params": params}, tokens, segments, valid)
    return jax.nn.softmax(logits)[:, 1]


def unsafe_probability(
    safety_filter: SafetyFilter, examples: Sequence[Example], batch_size: int = 64
):
    """Probability that each pair is unsafe, float32 `[n]`."""
    config, params, tokenizer = safety_filter
    arrays = encode_pairs(tokenizer, examples, config.max_length)
    out = []
    for start in range(0, len(examples), batch_size):
        batch = [a[start : start + batch_size] for a in arrays]
        size = len(batch[0])
        batch = [np.resize(a, (batch_size, a.shape[1])) for a in batch]
        out.append(np.asarray(_probability(config, params, *batch))[:size])
    return np.concatenate(out) if out else np.zeros(0, np.float32)


def quality(unsafe: Sequence[bool], flagged: Sequence[bool]) -> FilterQuality:
    """Accuracy, precision, recall and their harmonic mean in percent, for finding unsafe pairs."""
    unsafe, flagged = np.asarray(unsafe, bool), np.asarray(flagged, bool)
    tp, fp = int((unsafe & flagged).sum()), int((~unsafe & flagged).sum())
    tn, fn = int((~unsafe & ~flagged).sum()), int((unsafe & ~flagged).sum())
    precision, recall = 100 * tp / max(tp + fp, 1), 100 * tp / max(tp + fn, 1)
    hmean = 2 * precision * recall / max(precision + recall, 1e-9)
    accuracy = 100 * (tp + tn) / max(len(unsafe), 1)
    return FilterQuality(accuracy, precision, recall, hmean, tp, fp, tn, fn)
