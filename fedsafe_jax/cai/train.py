"""Training of the global adapter on revisions: imitation, preferences, decoupled refusal."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from fedsafe_jax.cai.losses import KL, LOSSES, SFT, Ratios
from fedsafe_jax.cai.steps import Pairs, Recipe, Step
from fedsafe_jax.models.decoder import Decoder
from fedsafe_jax.models.loss import packed_divergence, packed_loss, token_nll
from fedsafe_jax.models.microbatch import (
    compiler_options,
    count_on,
    value_and_grad_in_microbatches,
)
from fedsafe_jax.models.sharding import CLIENTS, beside, manual_axes


def log_likelihoods(
    model: Decoder, params: dict, factors: dict | None, pairs: Pairs, count: int
) -> jax.Array:
    """Sums the log-likelihood of each packed answer's learned tokens, float32 `[count]`.

    Args:
      model: the decoder.
      params: base parameters.
      factors: LoRA factors; None for the base model.
      pairs: packed answers.
      count: number of answers.
    """
    rows = pairs.rows
    variables = {"params": params} | ({} if factors is None else {"lora": factors})
    hidden, _ = model.apply(variables, rows.tokens, rows.positions, rows.segment_ids)
    nll = token_nll(model, params, hidden, rows.targets, rows.mask)
    owner = jnp.asarray(pairs.owner).reshape(-1)
    return -jax.ops.segment_sum(nll.reshape(-1), owner, num_segments=count + 1)[:count]


def preference_losses(
    ratios: jax.Array, on: jax.Array, names: Sequence[str], beta: float
) -> dict[str, jax.Array]:
    """Computes the mean of each loss over the pairs that are on.

    Args:
      ratios: log-ratios of answers in the order of `Pairs.rows`, float32 `[2 or 4 times pairs]`.
      on: float32 `[pairs]`, 0 for pairs that fill the batch.
      names: names of preference losses.
      beta: strength of the tie to the reference.
    """
    chosen, rejected, *mismatched = jnp.split(ratios, len(ratios) // len(on))
    by_answer = Ratios(chosen, rejected, on=on)
    if mismatched:
        by_answer = by_answer._replace(
            mismatched_chosen=mismatched[0], mismatched_rejected=mismatched[1]
        )
    means = {}
    for name in names:
        each = LOSSES[name].preference(by_answer, beta)
        means[name] = jnp.sum(each * on) / jnp.maximum(jnp.sum(on), 1.0)
    return means


@functools.lru_cache(maxsize=8)
def make_step(model: Decoder, recipe: Recipe) -> tuple[Callable, Callable]:
    """Builds `(init, step)`.

    `init(factors)` gives the optimizer's state, fresh every round. The jitted `step(factors, state,
    reference, base, data, learning_rate) -> (factors, state, losses)`; `reference` are LoRA
    factors, or None for the base model. Both models share the base parameters, so that no second
    model is held. On a model's mesh the rows of a step are dealt out along `clients`; factors,
    state and reference lie whole on every device, as the data do.
    """
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())
    mesh = model.config.mesh
    devices = 1 if mesh is None else mesh.shape[CLIENTS]
    imitate = value_and_grad_in_microbatches(
        functools.partial(packed_loss, model), platform=model.config.platform
    )

    def summed(tree):
        return jax.lax.psum(tree, CLIENTS) if devices > 1 else tree

    def of_rows(value_and_grad, factors, base, batch, number):
        """What this device's rows add to value and gradient of the mean over all rows' targets."""
        mine = _dealt(batch, devices, number)
        share = count_on(mine.mask) / jnp.maximum(count_on(batch.mask), 1)
        return jax.tree.map(lambda x: share * x, value_and_grad(factors, base, mine))

    def prefer(factors, reference, base, pairs: Pairs, number):
        count = len(pairs.on) * (4 if recipe.mismatched else 2)
        rows, owner = _dealt((pairs.rows, pairs.owner), devices, number)
        mine = pairs._replace(rows=rows, owner=owner)
        trained, pull_back = jax.vjp(
            lambda f: log_likelihoods(model, base, f, mine, count), factors
        )
        fixed = log_likelihoods(model, base, reference, mine, count)

        def weighted(ratios):
            means = preference_losses(ratios, pairs.on, recipe.preferences, recipe.beta)
            return sum(recipe.weight(name) * means[name] for name in means), means

        # An answer's tokens may lie on one device, and the answer that it is held against on
        # another; the loss needs the sums of both.
        slope, means = jax.grad(weighted, has_aux=True)(summed(trained - fixed))
        return means, *pull_back(slope)

    def gradients(factors, reference, base, data: Step, number):
        values, parts = {}, []
        if recipe.imitates_revisions or not recipe.holds_replay:
            values[SFT], gradient = of_rows(imitate, factors, base, data.imitation, number)
            parts.append((recipe.weight(SFT) or 1.0, gradient))
        if recipe.holds_replay:
            loss = functools.partial(packed_divergence, model, reference)
            hold = value_and_grad_in_microbatches(loss, platform=model.config.platform)
            values[KL], gradient = of_rows(hold, factors, base, data.held, number)
            parts.append((recipe.weight(KL), gradient))
        for name in recipe.own_rows:
            if name in data.rows:
                values[name], gradient = of_rows(imitate, factors, base, data.rows[name], number)
                parts.append((recipe.weight(name), gradient))
        means = {}
        if data.pairs is not None:
            means, gradient = prefer(factors, reference, base, data.pairs, number)
            parts.append((1.0, gradient))
        weights = [w for w, _ in parts]
        total = jax.tree.map(
            lambda *g: sum(w * x for w, x in zip(weights, g, strict=True)), *(g for _, g in parts)
        )
        total, values = summed((total, values))
        return total, values | means

    if devices > 1:
        whole = PartitionSpec()
        gradients = jax.shard_map(
            gradients, mesh=mesh, axis_names=manual_axes(mesh), check_vma=False,
            in_specs=(whole, whole, whole, whole, PartitionSpec(CLIENTS)), out_specs=whole,
        )  # fmt: skip

    @functools.partial(jax.jit, compiler_options=compiler_options(model.config.platform))
    def step(factors, state, reference, base, data, learning_rate):
        grads, values = gradients(factors, reference, base, data, jnp.arange(devices))
        direction, state = optimizer.update(grads, state, factors)
        moved = jax.tree.map(lambda p, d: p - learning_rate * d, factors, direction)
        return moved, state, values

    return lambda factors: beside(factors, optimizer.init(factors)), step


def _dealt(tree: Any, devices: int, number: jax.Array) -> Any:
    """Returns a device's rows of arrays `[rows, seq]`; filled rows come first, so all get some.

    Args:
      tree: pytree of arrays, whole on every device.
      devices: devices that share the rows; missing ones are empty.
      number: int32 `[1]`, this device's place among them.
    """
    if devices == 1:
        return tree

    def mine(x):
        x = jnp.pad(x, ((0, -len(x) % devices), (0, 0))).reshape(-1, devices, x.shape[-1])
        return jax.lax.dynamic_index_in_dim(x, number[0], axis=1, keepdims=False)

    return jax.tree.map(mine, tree)
