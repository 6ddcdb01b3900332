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

from fedsafe_jax.data.examples import Example
from fedsafe_jax.filters import stream, training
from fedsafe_jax.filters.decision import Decision
from fedsafe_jax.filters.protocol import FilterError, labelled
from fedsafe_jax.filters.training import TrainingOptions
from fedsafe_jax.models.encoder import Classifier, EncoderConfig

BATCH_TOKENS = 4096  # of a scoring batch
CHARACTERS_A_TOKEN = 24  # nothing longer than so many a token is tokenised


class ClassifierFilter(NamedTuple):
    """A trained encoder.

    Attributes:
      config, params: of `models.encoder.Classifier`.
      tokenizer: that its pairs are read with.
      max_length: tokens of a pair.
      decision: temperature and threshold.
      unsafe_classes: the classes that together are unsafe.
    """

    config: EncoderConfig
    params: dict
    tokenizer: object
    max_length: int
    decision: Decision = Decision()
    unsafe_classes: tuple[int, ...] = (1,)

    def log_odds(self, pairs: Sequence[Example]) -> np.ndarray:
        """See `protocol.SafetyFilter`."""
        rows = encode_pairs(self.tokenizer, pairs, self.max_length)
        return _log_odds(self.config, self.unsafe_classes, self.params, rows)

    def score(self, pairs: Sequence[Example]) -> np.ndarray:
        """See `protocol.SafetyFilter`."""
        return self.decision.probability(self.log_odds(pairs))


class Encoded(NamedTuple):
    """A pair's tokens, and where the response begins."""

    ids: list[int]
    response_start: int


@functools.lru_cache
def _frame(tokenizer) -> tuple[list[int], list[int], list[int]]:
    """What the tokenizer puts before, between and behind a pair, such as [CLS] and [SEP]."""
    if tokenizer.cls_token_id is None:
        return [], [], []
    first, second = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("a", "b"))
    pair = tokenizer("a", "b")["input_ids"]
    start = next(i for i in range(len(pair)) if pair[i : i + len(first)] == first)
    middle = start + len(first)
    behind = next(i for i in range(middle, len(pair)) if pair[i : i + len(second)] == second)
    return pair[:start], pair[middle:behind], pair[behind + len(second) :]


def encode_pairs(tokenizer, pairs: Sequence[Example], max_length: int) -> list[Encoded]:
    """Tokens of pairs: the end of the request, then the beginning of the response.

    Each gets half of the room, and what the other does not need.
    """
    before, between, behind = _frame(tokenizer)
    room = max_length - len(before) - len(between) - len(behind)
    if room < 8:
        raise FilterError(f"filter.max_length={max_length}: too short for a pair; use 64 or more.")
    limit = CHARACTERS_A_TOKEN * max_length

    def tokens(texts):
        return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    requests = tokens([e.prompt[-limit:] for e in pairs])
    responses = tokens([e.response[:limit] for e in pairs])
    rows = []
    for request, response in zip(requests, responses, strict=True):
        request = request[-max(room // 2, room - len(response)) :]
        response = response[: room - len(request)]
        start = len(before) + len(request) + len(between)
        rows.append(Encoded([*before, *request, *between, *response, *behind], start))
    return rows


def _arrays(rows: Sequence[Encoded], width: int, count: int):
    """`(tokens, types int32, valid bool)`, each `[count, width]`."""
    tokens = stream.stack([r.ids for r in rows], width, count)
    lengths = np.zeros((count, 1), np.int32)
    starts = np.zeros((count, 1), np.int32)
    for i, row in enumerate(rows):
        lengths[i], starts[i] = len(row.ids), row.response_start
    places = np.arange(width)
    valid = places < lengths
    return tokens, ((places >= starts) & valid).astype(np.int32), valid


@functools.partial(jax.jit, static_argnames=("config", "unsafe_classes"))
def _logits(config, unsafe_classes, params, tokens, types, valid):
    logits = Classifier(config).apply({"params": params}, tokens, types, valid)
    chance = jax.nn.log_softmax(logits)
    unsafe = jnp.isin(jnp.arange(config.num_labels), jnp.asarray(unsafe_classes))
    worse = jax.nn.logsumexp(jnp.where(unsafe, chance, -jnp.inf), axis=-1)
    return worse - jax.nn.logsumexp(jnp.where(unsafe, -jnp.inf, chance), axis=-1)


def _log_odds(config, unsafe_classes, params, rows: Sequence[Encoded]) -> np.ndarray:
    """Batches go to this process's devices in turn; all are sent before any result is read."""
    lengths, out = [len(r.ids) for r in rows], np.zeros(len(rows), np.float32)
    devices = jax.local_devices()
    copies = [jax.device_put(params, device) for device in devices]
    waiting = []
    for number, (chosen, width, count) in enumerate(stream.batches(lengths, BATCH_TOKENS)):
        batch = _arrays([rows[i] for i in chosen], min(width, config.max_length), count)
        turn = number % len(devices)
        batch = jax.device_put(batch, devices[turn])
        waiting.append((chosen, _logits(config, unsafe_classes, copies[turn], *batch)))
    for chosen, found in waiting:
        out[chosen] = np.asarray(found)[: len(chosen)]
    return out


def train(
    examples: Sequence[Example],
    tokenizer,
    seed: int,
    options: TrainingOptions | None = None,
    max_length: int = 128,
    start: tuple[EncoderConfig, dict] | None = None,
) -> tuple[ClassifierFilter, training.Trained]:
    """Trains the filter with AdamW and cross-entropy, classes weighted to balance.

    Args:
      examples: pairs labelled safe or unsafe; both must occur.
      tokenizer: Hugging Face tokenizer that the pairs are read with.
      seed: of initialisation, order and dropout.
      options: see `training.TrainingOptions`.
      max_length: tokens of a pair.
      start: a pre-trained encoder with a head of two classes, see `encoder_hub.load_classifier`;
        None for a small one from scratch.

    Raises:
      FilterError: one of the labels is missing, or max_length is too short.
    """
    pairs, _ = labelled(examples)
    rows = encode_pairs(tokenizer, pairs, max_length)
    if start is None:
        config = EncoderConfig(len(tokenizer), max_length=max_length)
        batch = _arrays(rows[:1], max_length, 1)
        params = Classifier(config).init(jax.random.key(seed), *batch)["params"]
    else:
        config, params = start
    model = Classifier(config)

    def loss_fn(params, frozen, batch, target, weight, key):
        del frozen
        rngs = {"dropout": key}
        logits = model.apply({"params": params}, *batch, deterministic=False, rngs=rngs)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, target)
        return jnp.sum(nll * weight) / jnp.sum(weight)

    trained = training.train(
        pairs,
        params,
        [len(r.ids) for r in rows],
        arrays=lambda chosen, width, count: _arrays(
            [rows[i] for i in chosen], min(width, config.max_length), count
        ),
        loss_fn=loss_fn,
        log_odds=lambda params, chosen: _log_odds(config, (1,), params, [rows[i] for i in chosen]),
        options=options or TrainingOptions(),
        seed=seed,
    )
    found = ClassifierFilter(
        config, trained.params, tokenizer, max_length=max_length, decision=trained.decision
    )
    return found, trained
