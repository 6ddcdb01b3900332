"""Training of any filter by the server: warm-up, class weights, early stopping, calibration."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedsafe_jax import random_streams
from fedsafe_jax.data.examples import Example
from fedsafe_jax.data.packing import round_up
from fedsafe_jax.filters import decision, protocol, quality
from fedsafe_jax.models.sharding import beside
from fedsafe_jax.random_streams import Purpose

BUCKET = 8  # batches that are sorted by length together


class TrainingOptions(NamedTuple):
    """How a filter is trained.

    Attributes:
      epochs: most passes over the data (the paper uses 5).
      batch_size: pairs per step.
      learning_rate: peak rate, reached after a tenth of the steps; falls as a cosine afterwards.
      weight_decay: decay of AdamW (arXiv 1711.05101).
      patience: epochs without a better validation loss before training ends; the best epoch's
        weights are kept.
      validation_share: share of the prompts that is held out; with 0 all pairs are trained on for
        all epochs, without calibration.
      target, precision_floor: how the threshold is chosen, see `decision.choose_threshold`.
      unsafe_share: share of unsafe pairs expected in use, for calibration and threshold; 0 for the
        share in validation.
    """

    epochs: int = 5
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    patience: int = 2
    validation_share: float = 0.15
    target: str = "f1"
    precision_floor: float = 0.9
    unsafe_share: float = 0.0


class Epoch(NamedTuple):
    """Validation results after an epoch."""

    loss: float  # nats, classes weighted
    auroc: float


class Trained(NamedTuple):
    """Outcome of training.

    Attributes:
      params: weights of the best epoch.
      decision: calibration and threshold.
      epochs: validation results after each epoch; [] without validation pairs.
      best: index of the epoch kept; -1 for the start.
    """

    params: dict
    decision: decision.Decision
    epochs: list[Epoch]
    best: int


class Network(NamedTuple):
    """What `train` needs to know of a filter's network and of its tokenised pairs.

    Attributes:
      lengths: tokens of each pair.
      make_batch: `(indices, width, rows) -> pytree` of padded arrays, rows past the last index
        empty.
      loss_fn: `(params, frozen, batch, unsafe int32 [rows], weights float32 [rows], key) ->
        scalar`.
      log_odds: `(params, indices) -> float32 [n]`.
      frozen: parameters that are not trained: a guard's base model.
    """

    lengths: Sequence[int]
    make_batch: Callable
    loss_fn: Callable
    log_odds: Callable
    frozen: dict | tuple = ()


def train(
    pairs: Sequence[Example], params: dict, network: Network, options: TrainingOptions, seed: int
) -> Trained:
    """Trains with AdamW, stops early, calibrates.

    Args:
      pairs: labelled pairs.
      params: weights that training starts from.
      network: loss and scores of the filter.
      options: see `TrainingOptions`.
      seed: seed of order, split and dropout.

    Raises:
      FilterError: one of the labels is missing, no epoch gave a finite validation loss, or the
        weights are not finite.
    """
    _, unsafe = protocol.labelled(pairs)
    learned, held = _split(pairs, unsafe, options.validation_share, seed)
    balance = (len(learned) / (2 * np.bincount(unsafe[learned]))).astype(np.float32)
    optimizer = make_optimizer(options, steps_per_epoch=-(-len(learned) // options.batch_size))
    params = beside(network.frozen, params)
    state = beside(params, optimizer.init(params))
    key = random_streams.key(Purpose.FILTER_DROPOUT, seed)
    # The loss alone: what jit may keep must not hold the network's base.
    step = make_step(network.loss_fn, optimizer)
    best_loss, best_params, best = np.inf, params, -1
    history: list[Epoch] = []
    for epoch in range(options.epochs):
        order = _epoch(learned, network.lengths, options.batch_size, seed=seed, epoch=epoch)
        for number, rows in enumerate(order):
            width = round_up(max(network.lengths[i] for i in rows))
            weight = np.zeros(options.batch_size, np.float32)
            weight[: len(rows)] = balance[unsafe[rows]]
            target = np.zeros(options.batch_size, np.int32)
            target[: len(rows)] = unsafe[rows]
            step_key = jax.random.fold_in(jax.random.fold_in(key, epoch), number)
            batch = network.make_batch(rows, width, options.batch_size)
            data = (batch, target, weight)
            params, state = step(params, state, network.frozen, data, step_key)
        if not len(held):
            best_params, best = params, epoch
            continue
        history.append(_validate(network.log_odds(params, held), unsafe[held], balance))
        if history[-1].loss < best_loss:
            best_loss, best_params, best = history[-1].loss, params, epoch
        elif epoch - best >= options.patience:
            break
    if options.epochs and best < 0:
        raise protocol.FilterError(
            "the filter's validation loss was never finite; lower filter.learning_rate "
            f"({options.learning_rate})."
        )
    # Without validation nothing has looked at what was learned.
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(best_params)):
        raise protocol.FilterError(
            "the filter's training diverged: its weights are not finite; lower "
            f"filter.learning_rate ({options.learning_rate})."
        )
    fitted = decision.Decision()
    if len(held):
        fitted = decision.fit(
            network.log_odds(best_params, held),
            unsafe[held],
            options.target,
            precision_floor=options.precision_floor,
            share=options.unsafe_share,
        )
    return Trained(best_params, fitted, history, best)


def make_step(loss_fn: Callable, optimizer: optax.GradientTransformation) -> Callable:
    """Returns the jitted step of training.

    Args:
      loss_fn: see `Network.loss_fn`.
      optimizer: optimizer of the trained parameters.

    Returns:
      `(params, state, frozen, (batch, unsafe, weights), key) -> (params, state)`.
    """

    @jax.jit
    def step(params, state, frozen, data, key):
        grads = jax.grad(loss_fn)(params, frozen, *data, key)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def _split(
    pairs: Sequence[Example], unsafe: np.ndarray, share: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the pairs to train on, and of those to validate on."""
    learned, held = protocol.split(pairs, seed, share)
    both = [len(set(unsafe[side].tolist())) == 2 for side in (learned, held)]
    if not all(both):  # too few prompts to hold any out
        learned, held = list(range(len(pairs))), []
    return np.array(learned), np.array(held, int)


def make_optimizer(options: TrainingOptions, steps_per_epoch: int) -> optax.GradientTransformation:
    """Returns AdamW after clipping, whose rate warms up and falls as a cosine."""
    total = max(options.epochs * steps_per_epoch, 2)
    warmup = max(total // 10, 1)
    schedule = optax.warmup_cosine_decay_schedule(0.0, options.learning_rate, warmup, total)
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=options.weight_decay)
    )


def _epoch(
    indices: np.ndarray, lengths: Sequence[int], batch_size: int, seed: int, epoch: int
) -> Iterator[np.ndarray]:
    """Shuffled batches whose rows are of similar length."""
    rng = random_streams.generator(Purpose.FILTER_ORDER, seed, epoch)
    order = indices[rng.permutation(len(indices))]
    batches: list[np.ndarray] = []
    for start in range(0, len(order), batch_size * BUCKET):
        bucket = sorted(order[start : start + batch_size * BUCKET], key=lambda i: lengths[i])
        batches += [np.array(bucket[b : b + batch_size]) for b in range(0, len(bucket), batch_size)]
    return (batches[i] for i in rng.permutation(len(batches)))


def _validate(log_odds: np.ndarray, unsafe: np.ndarray, balance: np.ndarray) -> Epoch:
    sign = np.where(unsafe == 1, 1.0, -1.0)
    weights = balance[unsafe]
    loss = float((weights * np.logaddexp(0, -sign * log_odds)).sum() / weights.sum())
    return Epoch(loss, quality.auroc(unsafe, log_odds))
