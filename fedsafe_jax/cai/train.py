"""Training of the global adapter on revisions: imitation, preferences, decoupled refusal."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedsafe_jax.cai import derta, losses
from fedsafe_jax.data.chat import Encoded
from fedsafe_jax.data.packing import Batch, assign_rows, fill
from fedsafe_jax.models.decoder import Decoder
from fedsafe_jax.models.loss import packed_loss, token_nll
from fedsafe_jax.models.microbatch import compiler_options, value_and_grad_in_microbatches

LOSSES = ("sft", *losses.PREFERENCES, "derta")


class Pairs(NamedTuple):
    """A step's preference pairs, packed.

    Attributes:
      rows: all answers: better ones, worse ones, and for KTO the next pair's better and worse ones.
      owner: int32 `[rows, seq]`, which answer each token belongs to; one past the last for padding.
      on: float32 `[pairs]`, 0 for pairs that fill the batch.
    """

    rows: Batch
    owner: np.ndarray
    on: np.ndarray


class Step(NamedTuple):
    """A step's data; None where a loss is not used.

    Attributes:
      imitation: packed revisions (where "sft" is among the losses) and replay.
      pairs: see `Pairs`.
      derta: packed rows of `cai.derta.batch`.
    """

    imitation: Batch
    pairs: Pairs | None
    derta: Batch | None


class Recipe(NamedTuple):
    """How a round trains.

    Attributes:
      losses: some of `LOSSES`.
      weights: of each. Replay has the weight of "sft", or 1.
      beta: of the preference losses.
      batch_size: dialogues imitated a step.
      pairs_per_step: pairs, or DeRTa's triples, a step.
      seq: tokens of a row.
    """

    losses: tuple[str, ...]
    weights: tuple[float, ...]
    beta: float
    batch_size: int
    pairs_per_step: int
    seq: int

    def weight(self, name: str) -> float:
        return dict(zip(self.losses, self.weights, strict=True)).get(name, 0.0)

    @property
    def preferences(self) -> tuple[str, ...]:
        return tuple(n for n in self.losses if n in losses.PREFERENCES)


def log_likelihoods(model: Decoder, params, adapter, pairs: Pairs, count: int) -> jax.Array:
    """Summed log-likelihood of each packed answer's learned tokens, float32 `[count]`."""
    rows = pairs.rows
    variables = {"params": params} | ({} if adapter is None else {"lora": adapter})
    hidden, _ = model.apply(variables, rows.tokens, rows.positions, rows.segment_ids)
    nll = token_nll(model, params, hidden, rows.targets, rows.mask)
    owner = jnp.asarray(pairs.owner).reshape(-1)
    return -jax.ops.segment_sum(nll.reshape(-1), owner, num_segments=count + 1)[:count]


def preference_losses(ratios: jax.Array, on, names: Sequence[str], beta: float) -> dict:
    """Mean loss of each name over the pairs that are on.

    Args:
      ratios: log-ratios of answers in the order of `Pairs.rows`, float32 `[2 or 4 times pairs]`.
      on: float32 `[pairs]`.
      names: some of `losses.PREFERENCES`.
      beta: see `losses`.
    """
    parts = jnp.split(ratios, len(ratios) // len(on))
    found = {}
    for name in names:
        if name == "kto":
            each = losses.kto(*parts, on, beta)
        else:
            each = getattr(losses, name)(parts[0], parts[1], beta)
        found[name] = jnp.sum(each * on) / jnp.maximum(jnp.sum(on), 1.0)
    return found


@functools.lru_cache(maxsize=8)
def make_step(model: Decoder, recipe: Recipe):
    """Builds `(start, step)`.

    `start(adapter)` gives the optimizer's state, fresh every round. The jitted `step(adapter,
    state, reference, base, data, rate) -> (adapter, state, losses)`; `reference` are LoRA factors,
    or None for the base model, and are not changed, so that no second model is held.
    """
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())

    imitate = value_and_grad_in_microbatches(functools.partial(packed_loss, model))

    def preference(adapter, reference, base, pairs: Pairs):
        count = len(pairs.on) * (4 if "kto" in recipe.preferences else 2)
        mine = log_likelihoods(model, base, adapter, pairs, count)
        fixed = log_likelihoods(model, base, reference, pairs, count)
        ratios = mine - jax.lax.stop_gradient(fixed)
        found = preference_losses(ratios, pairs.on, recipe.preferences, recipe.beta)
        return sum(recipe.weight(name) * found[name] for name in found), found

    def gradients(adapter, reference, base, data: Step):
        loss, gradient = imitate(adapter, base, data.imitation)
        found, parts = {"sft": loss}, [(recipe.weight("sft") or 1.0, gradient)]
        if data.derta is not None:
            found["derta"], gradient = imitate(adapter, base, data.derta)
            parts.append((recipe.weight("derta"), gradient))
        if data.pairs is not None:
            gradient, each = jax.grad(preference, has_aux=True)(
                adapter, reference, base, data.pairs
            )
            found |= each
            parts.append((1.0, gradient))
        weights = [w for w, _ in parts]
        total = jax.tree.map(
            lambda *g: sum(w * x for w, x in zip(weights, g, strict=True)), *(g for _, g in parts)
        )
        return total, found

    @functools.partial(jax.jit, compiler_options=compiler_options())
    def step(adapter, state, reference, base, data, rate):
        grads, found = gradients(adapter, reference, base, data)
        direction, state = optimizer.update(grads, state, adapter)
        return jax.tree.map(lambda p, d: p - rate * d, adapter, direction), state, found

    return optimizer.init, step


def draw(count: int, size: int, rng) -> list[int]:
    """`size` indices below `count`: all in random order, again and again; none of none."""
    order: list[int] = []
    while count and len(order) < size:
        order.extend(rng.permutation(count).tolist())
    return order[:size]


def pack_pairs(pairs: Sequence[tuple[Encoded, Encoded]], others, size: int, seq: int) -> Pairs:
    """Packs a step's pairs.

    Args:
      pairs: (better, worse) answers.
      others: for KTO, the next pair's (better, worse) answers to each pair's prompt; () for none.
      size: pairs of a step; missing ones are empty.
      seq: tokens of a row.
    """
    parts = [[p[0] for p in pairs], [p[1] for p in pairs]]
    if others:
        parts += [[o[0] for o in others], [o[1] for o in others]]
    number = [part * size + i for part, some in enumerate(parts) for i in range(len(some))]
    flat = [e for some in parts for e in some]
    rows = assign_rows([len(e.ids) for e in flat], seq)
    packed = fill(flat, rows, max(len(rows), 1), seq)
    owner = np.full(packed.tokens.shape, 4 * size, np.int32)
    for r, members in enumerate(rows):
        for segment, index in enumerate(members, 1):
            owner[r, packed.segment_ids[r] == segment] = number[index]
    on = (np.arange(size) < len(pairs)).astype(np.float32)
    return Pairs(packed, owner, on)


def steps(
    recipe: Recipe,
    count: int,
    imitation: Sequence[Encoded],
    triples: Sequence[derta.Triple],
    encode,
    seed: Sequence[int],
    tokenizer=None,
    refusal: int = 0,
) -> list[Step]:
    """A round's data, step by step, all of one shape.

    Args:
      recipe: see `Recipe`.
      count: steps.
      imitation: encoded dialogues to imitate, at least one.
      triples: answers that were mended: (prompt, worse, better); may be empty.
      encode: `(prompt, response) -> Encoded or None`.
      seed: of the order.
      tokenizer, refusal: for DeRTa, see `derta.batch`.
    """
    rng = np.random.default_rng(seed)
    order = draw(len(imitation), count * recipe.batch_size, rng)
    chosen = draw(len(triples), count * recipe.pairs_per_step, rng)
    found = []
    for s in range(count):
        some = [imitation[i] for i in order[s * recipe.batch_size : (s + 1) * recipe.batch_size]]
        rows = assign_rows([len(e.ids) for e in some], recipe.seq)
        numbers = range(s * recipe.pairs_per_step, (s + 1) * recipe.pairs_per_step)
        mine = [triples[chosen[n]] for n in numbers if n < len(chosen)]
        pairs = turned = None
        if recipe.preferences and mine:
            encoded, others = _encoded_pairs(mine, encode, "kto" in recipe.preferences)
            pairs = pack_pairs(encoded, others, recipe.pairs_per_step, recipe.seq)
        if "derta" in recipe.losses and mine:
            turned = derta.batch(tokenizer, mine, numbers, refusal=refusal, seq=recipe.seq, rng=rng)
        found.append(Step(fill(some, rows, len(rows), recipe.seq), pairs, turned))
    return _same_rows(found, 4 * recipe.pairs_per_step)


def _same_rows(found: list[Step], nobody: int) -> list[Step]:
    """Pads every kind of rows to a power of two that fits all of a round, so that few programs are
    compiled in all rounds; most of what is padded is skipped where rows are worked off in passes.
    """

    def most(batches):
        rows = max((len(b.tokens) for b in batches if b is not None), default=1)
        return 1 << (rows - 1).bit_length()

    def grown(array, count, value=0):
        return np.pad(array, ((0, count - len(array)), (0, 0)), constant_values=value)

    def padded(batch, count):
        return None if batch is None else Batch(*(grown(field, count) for field in batch))

    imitation = most([s.imitation for s in found])
    answers = most([s.pairs and s.pairs.rows for s in found])
    turned = most([s.derta for s in found])
    return [
        Step(
            padded(s.imitation, imitation),
            s.pairs
            and Pairs(
                padded(s.pairs.rows, answers), grown(s.pairs.owner, answers, nobody), s.pairs.on
            ),
            padded(s.derta, turned),
        )
        for s in found
    ]


def _encoded_pairs(triples, encode, mismatch: bool):
    """Encoded pairs, and with `mismatch` the next triple's answers to each prompt."""
    pairs, others = [], []
    for i, triple in enumerate(triples):
        following = triples[(i + 1) % len(triples)]
        found = [encode(triple.prompt, triple.safe), encode(triple.prompt, triple.harmful)]
        if mismatch:
            found += [encode(triple.prompt, following.safe)]
            found += [encode(triple.prompt, following.harmful)]
        if all(e is not None for e in found):
            pairs.append(tuple(found[:2]))
            others.append(tuple(found[2:]))
    return pairs, others if mismatch else ()
