"""Training of the global adapter on revisions: imitation, preferences, decoupled refusal."""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedsafe_jax.cai.derta import Triple
from fedsafe_jax.cai.losses import LOSSES, SFT, Ratios
from fedsafe_jax.data.chat import Encoded
from fedsafe_jax.data.examples import Messages
from fedsafe_jax.data.packing import Batch, assign_rows, fill
from fedsafe_jax.models.decoder import Decoder
from fedsafe_jax.models.loss import packed_loss, token_nll
from fedsafe_jax.models.microbatch import compiler_options, value_and_grad_in_microbatches
from fedsafe_jax.models.sharding import beside
from fedsafe_jax.random_streams import Purpose, generator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Encode = Callable[[Messages, str], Encoded | None]  # (dialogue, response)


class Pairs(NamedTuple):
    """Preference pairs of a step, packed.

    Attributes:
      rows: all answers: better ones, worse ones, and for a loss that needs them the next pair's
        better and worse ones.
      owner: int32 `[rows, seq]`, which answer each token belongs to; one past the last for padding.
      on: float32 `[pairs]`, 0 for pairs that fill the batch.
    """

    rows: Batch
    owner: np.ndarray
    on: np.ndarray


class Step(NamedTuple):
    """Data of a step.

    Attributes:
      imitation: packed revisions (where "sft" is among the losses) and replay.
      pairs: see `Pairs`; None without a preference loss or without triples.
      rows: packed rows of the losses that make their own, by the loss's name.
    """

    imitation: Batch
    pairs: Pairs | None
    rows: dict[str, Batch]


class Recipe(NamedTuple):
    """How a round trains.

    Attributes:
      losses: names in `losses.LOSSES`.
      weights: weight of each loss. Replay has the weight of "sft", or 1 without it.
      beta: strength of the preference losses' tie to the reference.
      batch_size: dialogues imitated per step.
      pairs_per_step: preference pairs, or triples of a loss that makes its own rows, per step.
      seq: tokens of a row.
    """

    losses: tuple[str, ...]
    weights: tuple[float, ...]
    beta: float
    batch_size: int
    pairs_per_step: int
    seq: int

    def weight(self, name: str) -> float:
        """Returns the weight of a loss, 0 for one that is not used."""
        return dict(zip(self.losses, self.weights, strict=True)).get(name, 0.0)

    @property
    def preferences(self) -> tuple[str, ...]:
        """Names of the preference losses."""
        return tuple(name for name in self.losses if LOSSES[name].preference)

    @property
    def mismatched(self) -> bool:
        """Whether a loss needs the next pair's answers to each prompt."""
        return any(LOSSES[name].mismatched for name in self.losses)

    @property
    def own_rows(self) -> tuple[str, ...]:
        """Names of the losses that make rows of their own."""
        return tuple(name for name in self.losses if LOSSES[name].make_rows)

    @property
    def imitates_revisions(self) -> bool:
        """Whether revisions are imitated besides the replay."""
        return SFT in self.losses


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

    def gradients(factors, reference, base, data: Step):
        loss, gradient = imitate(factors, base, data.imitation)
        values, parts = {SFT: loss}, [(recipe.weight(SFT) or 1.0, gradient)]
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


def draw(count: int, size: int, rng: np.random.Generator) -> list[int]:
    """Draws `size` indices below `count`: all in random order, again and again.

    [] where `count` is 0.
    """
    order: list[int] = []
    while count and len(order) < size:
        order.extend(rng.permutation(count).tolist())
    return order[:size]


def pack_pairs(
    pairs: Sequence[tuple[Encoded, Encoded]],
    mismatched: Sequence[tuple[Encoded, Encoded]],
    size: int,
    seq: int,
) -> Pairs:
    """Packs the preference pairs of a step.

    Args:
      pairs: (better, worse) answers.
      mismatched: the next pair's (better, worse) answers to each pair's prompt; () for none.
      size: number of pairs of a step; missing ones are empty.
      seq: tokens of a row.
    """
    parts = [[p[0] for p in pairs], [p[1] for p in pairs]]
    if mismatched:
        parts += [[m[0] for m in mismatched], [m[1] for m in mismatched]]
    number = [part * size + i for part, answers in enumerate(parts) for i in range(len(answers))]
    flat = [e for answers in parts for e in answers]
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
    triples: Sequence[Triple],
    encode: Encode,
    seed: Sequence[int],
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    refusal: int = 0,
) -> list[Step]:
    """Draws and packs a round's data, step by step, all of one shape.

    Args:
      recipe: how the round trains.
      count: number of steps.
      imitation: encoded dialogues to imitate, at least one.
      triples: answers that were mended: (prompt, worse, better); may be empty.
      encode: encodes a dialogue and a response; None where nothing of it is left to learn.
      seed: seed of the order and its place, such as (seed, round).
      tokenizer, refusal: tokenizer and refusal token, for losses that make rows of their own.
    """
    rng = generator(Purpose.CAI_STEPS, *seed)
    order = draw(len(imitation), count * recipe.batch_size, rng)
    chosen = draw(len(triples), count * recipe.pairs_per_step, rng)
    data = []
    for s in range(count):
        dialogues = [imitation[i] for i in order[s * recipe.batch_size :][: recipe.batch_size]]
        rows = assign_rows([len(e.ids) for e in dialogues], recipe.seq)
        numbers = range(s * recipe.pairs_per_step, (s + 1) * recipe.pairs_per_step)
        drawn = [triples[chosen[n]] for n in numbers if n < len(chosen)]
        pairs, own_rows = None, {}
        if recipe.preferences and drawn:
            encoded, mismatched = _encoded_pairs(drawn, encode, recipe.mismatched)
            pairs = pack_pairs(encoded, mismatched, recipe.pairs_per_step, recipe.seq)
        for name in recipe.own_rows if drawn else ():
            own_rows[name] = LOSSES[name].make_rows(
                tokenizer, drawn, numbers, refusal=refusal, seq=recipe.seq, rng=rng
            )
        data.append(Step(fill(dialogues, rows, len(rows), recipe.seq), pairs, own_rows))
    return _same_rows(data, 4 * recipe.pairs_per_step)


def _same_rows(data: Sequence[Step], no_owner: int) -> list[Step]:
    """Pads every kind of rows to a power of two that fits all steps of a round.

    So few programs are compiled in all rounds; most padding is skipped where rows are worked off in
    microbatches.
    """

    def common_count(batches: Sequence[Batch | None]) -> int:
        rows = max((len(b.tokens) for b in batches if b is not None), default=1)
        return 1 << (rows - 1).bit_length()

    def grown(array, count, value=0):
        return np.pad(array, ((0, count - len(array)), (0, 0)), constant_values=value)

    def padded(batch: Batch, count: int) -> Batch:
        return Batch(*(grown(field, count) for field in batch))

    imitation = common_count([s.imitation for s in data])
    answers = common_count([s.pairs and s.pairs.rows for s in data])
    names = {name for s in data for name in s.rows}
    own = {name: common_count([s.rows.get(name) for s in data]) for name in names}
    return [
        Step(
            padded(s.imitation, imitation),
            s.pairs
            and Pairs(
                padded(s.pairs.rows, answers), grown(s.pairs.owner, answers, no_owner), s.pairs.on
            ),
            {name: padded(rows, own[name]) for name, rows in s.rows.items()},
        )
        for s in data
    ]


def _encoded_pairs(
    triples: Sequence[Triple], encode: Encode, mismatch: bool
) -> tuple[list[tuple[Encoded, Encoded]], Sequence[tuple[Encoded, Encoded]]]:
    """Encoded pairs, and with `mismatch` the next triple's answers to each prompt."""
    pairs, mismatched = [], []
    for i, triple in enumerate(triples):
        following = triples[(i + 1) % len(triples)]
        answers = [encode(triple.turns, triple.safe), encode(triple.turns, triple.harmful)]
        if mismatch:
            answers += [encode(triple.turns, following.safe)]
            answers += [encode(triple.turns, following.harmful)]
        if all(e is not None for e in answers):
            pairs.append(tuple(answers[:2]))
            mismatched.append(tuple(answers[2:]))
    return pairs, mismatched if mismatch else ()
