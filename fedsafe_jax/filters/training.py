"""The server's training of any filter: warm-up, class weights, early stopping, calibration."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
import optax

from fedsafe_jax.data.examples import Example
from fedsafe_jax.data.packing import round_up
from fedsafe_jax.filters import decision, protocol, quality

BUCKET = 8  # batches that are sorted by length together


class TrainingOptions(NamedTuple):
    """How a filter is trained.

    Attributes:
      epochs: most passes over the data (the paper uses 5).
      batch_size: pairs a step.
      learning_rate: peak, after a tenth of the steps; then falls as a cosine.
      weight_decay: of AdamW.
      patience: epochs without a better validation loss before training ends; the best epoch's
        weights are kept.
      validation_share: of the prompts; 0 trains on all, for all epochs, without calibration.
      target, precision_floor: of the threshold, see `decision.choose_threshold`.
      unsafe_share: expected in use, for calibration and threshold; 0: as in validation.
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
    """Validation after an epoch."""

    loss: float  # nats, classes weighted
    auroc: float


class Trained(NamedTuple):
    """What training gives."""

    params: dict
    decision: decision.Decision
    epochs: list[Epoch]
    best: int  # index of the epoch kept; -1 for the start


def train(
    pairs: Sequence[Example],
    params,
    lengths: Sequence[int],
    arrays: Callable,
    loss_fn: Callable,
    log_odds: Callable,
    options: TrainingOptions,
    seed: int,
    frozen=(),
) -> Trained:
    """Trains, stops early, calibrates.

    Args:
      pairs: labelled ones.
      params: trained from here.
      lengths: tokens of each pair.
      arrays: `(indices, width, rows) -> pytree` of a batch, rows past the end empty.
      loss_fn: `(params, frozen, batch, unsafe int32 [rows], weights float32 [rows], key) ->
        scalar`.
      log_odds: `(params, indices) -> float32 [n]`.
      options: see `TrainingOptions`.
      seed: of order, split and dropout.
      frozen: what is not trained, such as a guard's base.

    Raises:
      FilterError: one of the labels is missing, or no epoch gave a finite validation loss.
    """
    _, unsafe = protocol.labelled(pairs)
    learned, held = protocol.split(pairs, seed, options.validation_share)
    both = [len(set(unsafe[side].tolist())) == 2 for side in (learned, held)]
    if not all(both):  # too few prompts to hold any out
        learned, held = list(range(len(pairs))), []
    learned, held = np.array(learned), np.array(held, int)
    balance = (len(learned) / (2 * np.bincount(unsafe[learned]))).astype(np.float32)
    steps_an_epoch = -(-len(learned) // options.batch_size)
    total = max(options.epochs * steps_an_epoch, 2)
    warmup = max(total // 10, 1)
    schedule = optax.warmup_cosine_decay_schedule(0.0, options.learning_rate, warmup, total)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=options.weight_decay)
    )
    state, key = optimizer.init(params), jax.random.key(seed)

    @jax.jit
    def step(params, state, frozen, batch, target, weight, key):
        grads = jax.grad(loss_fn)(params, frozen, batch, target, weight, key)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    best, kept, history = np.inf, params, []
    chosen = -1
    for epoch in range(options.epochs):
        for number, rows in enumerate(_epoch(learned, lengths, options.batch_size, seed, epoch)):
            width = round_up(max(lengths[i] for i in rows))
            weight = np.zeros(options.batch_size, np.float32)
            weight[: len(rows)] = balance[unsafe[rows]]
            target = np.zeros(options.batch_size, np.int32)
            target[: len(rows)] = unsafe[rows]
            step_key = jax.random.fold_in(jax.random.fold_in(key, epoch), number)
            batch = arrays(rows, width, options.batch_size)
            params, state = step(
                params, state, frozen, batch=batch, target=target, weight=weight, key=step_key
            )
        if not len(held):
            kept, chosen = params, epoch
            continue
        z = log_odds(params, held)
        sign = np.where(unsafe[held] == 1, 1.0, -1.0)
        weights = balance[unsafe[held]]
        loss = float((weights * np.logaddexp(0, -sign * z)).sum() / weights.sum())
        history.append(Epoch(loss, quality.auroc(unsafe[held], z)))
        if loss < best:
            best, kept, chosen = loss, params, epoch
        elif epoch - chosen >= options.patience:
            break
    if options.epochs and chosen < 0:
        raise protocol.FilterError(
            "the filter's validation loss was never finite; lower filter.learning_rate "
            f"({options.learning_rate})."
        )
    found = decision.Decision()
    if len(held):
        found = decision.fit(
            log_odds(kept, held), unsafe[held], options.target, options.precision_floor,
            options.unsafe_share,
        )  # fmt: skip
    return Trained(kept, found, history, chosen)


def _epoch(indices, lengths, batch_size: int, seed: int, epoch: int):
    """Shuffled batches whose rows are of like length."""
    rng = np.random.default_rng([seed, epoch])
    order = indices[rng.permutation(len(indices))]
    made = []
    for start in range(0, len(order), batch_size * BUCKET):
        some = sorted(order[start : start + batch_size * BUCKET], key=lambda i: lengths[i])
        made += [np.array(some[b : b + batch_size]) for b in range(0, len(some), batch_size)]
    return [made[i] for i in rng.permutation(len(made))]
