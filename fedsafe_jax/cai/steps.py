"""What a round of Constitutional AI trains on: dialogues, pairs and replay as packed steps."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fedsafe_jax.cai.derta import Triple
from fedsafe_jax.cai.losses import KL, LOSSES, SFT
from fedsafe_jax.data.chat import Encoded
from fedsafe_jax.data.examples import Messages
from fedsafe_jax.data.packing import Batch, assign_rows, fill
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
      imitation: packed revisions (where "sft" is among the losses), and the replay unless it is
        held.
      pairs: see `Pairs`; None without a preference loss or without triples.
      rows: packed rows of the losses that make their own, by the loss's name.
      held: packed replay on which "kl" keeps the model what it was; None without that loss.
    """

    imitation: Batch
    pairs: Pairs | None
    rows: dict[str, Batch]
    held: Batch | None = None


class Recipe(NamedTuple):
    """How a round trains.

    Attributes:
      losses: names in `losses.LOSSES`.
      weights: weight of each loss. Replay has the weight of "kl", else of "sft", or 1 without
        either.
      beta: strength of the preference losses' tie to the reference.
      batch_size: dialogues imitated or held per step.
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

    @property
    def holds_replay(self) -> bool:
        """Whether the model is held to its reference on the replay, which is not imitated then."""
        return KL in self.losses


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


def make_steps(
    recipe: Recipe,
    count: int,
    imitation: Sequence[Encoded],
    triples: Sequence[Triple],
    encode: Encode,
    seed: Sequence[int],
    replayed: int = 0,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    refusal: int = 0,
) -> list[Step]:
    """Draws and packs a round's data, step by step, all of one shape.

    Args:
      recipe: how the round trains.
      count: number of steps.
      imitation: encoded dialogues to imitate, at least one; the replay first.
      triples: answers that were mended: (prompt, worse, better); may be empty.
      encode: encodes a dialogue and a response; None where nothing of it is left to learn.
      seed: seed of the order and its place, such as (seed, round).
      replayed: how many of `imitation` are replay.
      tokenizer, refusal: tokenizer and refusal token, for losses that make rows of their own.
    """
    rng = generator(Purpose.CAI_STEPS, *seed)
    order = draw(len(imitation), count * recipe.batch_size, rng)
    chosen = draw(len(triples), count * recipe.pairs_per_step, rng)
    data = []
    for s in range(count):
        turn = order[s * recipe.batch_size :][: recipe.batch_size]
        first_imitated = replayed if recipe.holds_replay else 0
        imitated = _packed([imitation[i] for i in turn if i >= first_imitated], recipe.seq)
        held = None
        if recipe.holds_replay:
            held = _packed([imitation[i] for i in turn if i < replayed], recipe.seq)
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
        data.append(Step(imitated, pairs, own_rows, held))
    return _same_rows(data, 4 * recipe.pairs_per_step)


def _packed(dialogues: Sequence[Encoded], seq: int) -> Batch:
    """Packs dialogues; one empty row where there are none."""
    rows = assign_rows([len(e.ids) for e in dialogues], seq)
    return fill(dialogues, rows, max(len(rows), 1), seq)


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
    held = common_count([s.held for s in data])
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
            s.held and padded(s.held, held),
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
