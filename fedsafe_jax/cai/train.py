"""Training of the global adapter on revisions: imitation, preferences, decoupled refusal."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from fedsafe_jax.cai.losses import KL, LOSSES, SFT, Ratios
from fedsafe_jax.cai.steps import Pairs, Recipe, Step
from fedsafe_jax.data.packing import Batch
from fedsafe_jax.models.decoder import Decoder
from fedsafe_jax.models.loss import packed_divergence, packed_loss, token_nll
from fedsafe_jax.models.microbatch import compiler_options, value_and_grad_in_microbatches
from fedsafe_jax.models.sharding import beside


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
    model is held.
    """
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())
    imitate = value_and_grad_in_microbatches(
        functools.partial(packed_loss, model), platform=model.config.platform
    )

    def preference(factors, reference, base, pairs: Pairs):
        count = len(pairs.on) * (4 if recipe.mismatched else 2)
        trained = log_likelihoods(model, base, factors, pairs, count)
        fixed = log_likelihoods(model, base, reference, pairs, count)
        ratios = trained - jax.lax.stop_gradient(fixed)
        means = preference_losses(ratios, pairs.on, recipe.preferences, recipe.beta)
        return sum(recipe.weight(name) * means[name] for name in means), means

    def hold(factors, reference, base, rows: Batch):
        loss = functools.partial(packed_divergence, model, reference)
        kept = value_and_grad_in_microbatches(loss, platform=model.config.platform)
        return kept(factors, base, rows)

    def gradients(factors, reference, base, data: Step):
        values, parts = {}, []
        if recipe.imitates_revisions or not recipe.holds_replay:
            values[SFT], gradient = imitate(factors, base, data.imitation)
            parts.append((recipe.weight(SFT) or 1.0, gradient))
        if recipe.holds_replay:
            values[KL], gradient = hold(factors, reference, base, data.held)
            parts.append((recipe.weight(KL), gradient))
        for name in recipe.own_rows:
            if name in data.rows:
                values[name], gradient = imitate(factors, base, data.rows[name])
                parts.append((recipe.weight(name), gradient))
        if data.pairs is not None:
            gradient, means = jax.grad(preference, has_aux=True)(
                factors, reference, base, data.pairs
            )
            values |= means
            parts.append((1.0, gradient))
        weights = [w for w, _ in parts]
        total = jax.tree.map(
            lambda *g: sum(w * x for w, x in zip(weights, g, strict=True)), *(g for _, g in parts)
        )
        return total, values

    @functools.partial(jax.jit, compiler_options=compiler_options(model.config.platform))
    def step(factors, state, reference, base, data, learning_rate):
        grads, values = gradients(factors, reference, base, data)
        direction, state = optimizer.update(grads, state, factors)
        moved = jax.tree.map(lambda p, d: p - learning_rate * d, factors, direction)
        return moved, state, values

    return lambda factors: beside(factors, optimizer.init(factors)), step
