"""Light Constitutional AI training of the global adapter: SFT on revisions, DPO against answers."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedsafe_jax.data.chat import Encoded
from fedsafe_jax.data.packing import Batch, assign_rows, bucket, fill
from fedsafe_jax.models.decoder import Decoder
from fedsafe_jax.models.loss import packed_loss, token_nll


class CaiBatch(NamedTuple):
    """A step's data."""

    sft: Batch  # packed [rows, seq]
    pairs: Batch  # one sequence a row: chosen rows first, then rejected; [2 * pairs, seq]
    pair_on: jax.Array  # float32 [pairs], 0 for filling


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta: float) -> jax.Array:
    """Direct preference loss a pair (Rafailov et al., 2023, equation 7), float32 `[pairs]`.

    Args:
      chosen, rejected: summed response log-likelihoods under the adapter in training, `[pairs]`.
      ref_chosen, ref_rejected: the same under the reference.
      beta: strength of the tie to the reference.
    """
    return -jax.nn.log_sigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected)))


def _response_log_likelihood(model, params, adapter, rows: Batch) -> jax.Array:
    hidden, _ = model.apply(
        {"params": params, "lora": adapter}, rows.tokens, rows.positions, rows.segment_ids
    )
    return -token_nll(model, params, hidden, rows.targets, rows.mask).sum(-1)


def make_train(model: Decoder, beta: float, dpo_weight: float):
    """Builds the jitted training of one round.

    The reference of DPO is the adapter at the start of the round: its log-likelihoods are computed
    once a step from the untouched copy, so no second model is held.

    Returns:
      `(adapter, base, batches with leading [steps], rate) -> (adapter, sft losses, dpo losses)`.
    """
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())

    def loss_fn(adapter, reference, base, batch: CaiBatch):
        sft = packed_loss(model, adapter, base, batch.sft)
        if dpo_weight == 0:
            return sft, (sft, jnp.zeros(()))
        chosen, rejected = jnp.split(_response_log_likelihood(model, base, adapter, batch.pairs), 2)
        fixed = _response_log_likelihood(model, base, reference, batch.pairs)
        ref_chosen, ref_rejected = jnp.split(jax.lax.stop_gradient(fixed), 2)
        losses = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta)
        dpo = jnp.sum(losses * batch.pair_on) / jnp.maximum(jnp.sum(batch.pair_on), 1.0)
        return sft + dpo_weight * dpo, (sft, dpo)

    def train(adapter, base, batches: CaiBatch, rate):
        def step(carry, batch):
            current, state = carry
            (_, losses), grads = jax.value_and_grad(loss_fn, has_aux=True)(
                current, adapter, base, batch
            )
            direction, state = optimizer.update(grads, state, current)
            current = jax.tree.map(lambda p, d: p - rate * d, current, direction)
            return (current, state), losses

        (trained, _), (sft, dpo) = jax.lax.scan(step, (adapter, optimizer.init(adapter)), batches)
        return trained, sft, dpo

    return jax.jit(train)


def make_batches(
    sft: Sequence[Encoded],
    pairs: Sequence[tuple[Encoded, Encoded]],
    steps: int,
    batch_size: int,
    pairs_per_step: int,
    seq: int,
    seed: Sequence[int],
) -> CaiBatch:
    """Draws `steps` batches, with leading axis `[steps]`.

    Args:
      sft: encoded dialogues to imitate (revisions and benign replay), at least one.
      pairs: (revision, initial answer) of the same prompt; may be empty.
      steps: training steps.
      batch_size: dialogues a step.
      pairs_per_step: preference pairs a step.
      seq: row length.
      seed: of the order.
    """
    rng = np.random.default_rng(seed)

    def draw(count, size):
        order: list[int] = []
        while count and len(order) < size:
            order.extend(rng.permutation(count))
        return order[:size]

    order = draw(len(sft), steps * batch_size)
    chosen = [[sft[i] for i in order[s * batch_size : (s + 1) * batch_size]] for s in range(steps)]
    rows = [assign_rows([len(e.ids) for e in examples], seq) for examples in chosen]
    count = bucket(max(len(r) for r in rows))
    packed = [fill(examples, r, count, seq) for examples, r in zip(chosen, rows, strict=True)]
    pair_order = draw(len(pairs), steps * pairs_per_step)
    pair_rows, pair_on = [], np.zeros((steps, pairs_per_step), np.float32)
    for s in range(steps):
        mine = [pairs[i] for i in pair_order[s * pairs_per_step : (s + 1) * pairs_per_step]]
        examples = [c for c, _ in mine] + [r for _, r in mine]
        missing = pairs_per_step - len(mine)
        where = [[i] for i in range(len(mine))] + [[]] * missing
        where += [[len(mine) + i] for i in range(len(mine))] + [[]] * missing
        pair_rows.append(fill(examples, where, 2 * pairs_per_step, seq))
        pair_on[s, : len(mine)] = 1
    stack = lambda batches: Batch(*(np.stack(f) for f in zip(*batches, strict=True)))  # noqa: E731
    return CaiBatch(stack(packed), stack(pair_rows), pair_on)
