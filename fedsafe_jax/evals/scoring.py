"""Log-likelihoods of given answers: the basis of held-out loss and of every choice of options."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedsafe_jax.data import packing
from fedsafe_jax.data.chat import Encoded
from fedsafe_jax.evals import continuations
from fedsafe_jax.inference.language_model import LanguageModel
from fedsafe_jax.models.loss import token_nll
from fedsafe_jax.models.sharding import fetch

BATCH_ROWS = 16  # packed rows scored at once


@functools.partial(jax.jit, static_argnames=("model",))
def _score(model, params, factors, batch):
    """Returns the negative log-likelihood of each target token, float32 `[rows, seq]`."""
    variables = {"params": params} | ({"lora": factors} if factors is not None else {})
    hidden, _ = model.apply(variables, batch.tokens, batch.positions, batch.segment_ids)
    return token_nll(model, params, hidden, batch.targets, batch.mask)


@functools.partial(jax.jit, static_argnames=("model",))
def _score_options(model, params, factors, batch, targets):
    """Returns the negative log-likelihood of k targets at each place, float32 `[k, rows, seq]`.

    Args:
      model, params, factors, batch: as in `_score`.
      targets: int32 `[k, rows, seq]`.
    """
    variables = {"params": params} | ({"lora": factors} if factors is not None else {})
    hidden, _ = model.apply(variables, batch.tokens, batch.positions, batch.segment_ids)
    return jnp.stack([token_nll(model, params, hidden, one, batch.mask) for one in targets])


def score_examples(
    lm: LanguageModel, encoded: Sequence[Encoded], seq: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sums the log-likelihood of the target tokens of each encoded dialogue.

    Args:
      lm: the model, under its adapter.
      encoded: dialogues of at most `seq` tokens.
      seq: tokens of a packed row.

    Returns:
      `(log_likelihood float64 [n] in nats, target tokens int [n])`.
    """
    lm = lm.on_one_device()
    assigned = packing.assign_rows([len(e.ids) for e in encoded], seq)
    totals, counts = np.zeros(len(encoded)), np.zeros(len(encoded), int)
    for start in range(0, len(assigned), BATCH_ROWS):
        rows = assigned[start : start + BATCH_ROWS]
        batch = packing.fill(encoded, rows, BATCH_ROWS, seq)
        nll = fetch(_score(lm.model, lm.params, lm.factors, batch))
        for r, members in enumerate(rows):
            for segment, index in enumerate(members, 1):
                inside = batch.segment_ids[r] == segment
                totals[index] = -nll[r, inside].sum(dtype=np.float64)
                counts[index] = int(batch.mask[r, inside].sum())
    return totals, counts


class Scores(NamedTuple):
    """What `choices` returns, each `[n, k]` for n items of at most k options.

    Attributes:
      log_likelihood: float64, in nats, summed over an option's tokens; -inf where an item has fewer
        options than others, NaN where the model diverged.
      tokens: int, the option's tokens; 0 where there is no option.
      cut: bool `[n]`, whether the item lost its beginning, being longer than the model's context.
    """

    log_likelihood: np.ndarray
    tokens: np.ndarray
    cut: np.ndarray

    def best(self, lengths: np.ndarray | None = None) -> list[int | None]:
        """Returns the index of the likeliest option of each item, the first of equal ones.

        None where one of them is no number: a model that diverged chooses nothing.

        Args:
          lengths: `[n, k]`, by which log-likelihoods are divided first; None for sums.
        """
        there = self.tokens > 0
        scores = self.log_likelihood / (1 if lengths is None else np.where(there, lengths, 1))
        sound = np.where(there, np.isfinite(scores), True).all(axis=1)
        chosen = np.argmax(np.where(there, scores, -np.inf), axis=1)
        return [int(i) if fine else None for i, fine in zip(chosen, sound, strict=True)]


def choices(
    lm: LanguageModel,
    contexts: Sequence[Any],
    options: Sequence[Sequence[str]],
    max_length: int,
    encode: Callable[..., list[Encoded]] = continuations.behind_dialogue,
) -> Scores:
    """Scores the options of each item by their log-likelihood behind what is asked.

    Where the options of an item are one token each behind the same text, such as letters, they are
    read off one row; elsewhere each option is a row of its own.

    Args:
      lm: the model, under its adapter.
      contexts: what is asked: dialogues, or texts, as `encode` takes them.
      options: the options of each item; items may have different numbers of them.
      max_length: tokens of a packed row; what is longer gets longer rows, up to the model's context
        (and beyond it for dialogues, which their task has cut).
      encode: how options stand behind a context, see `continuations`.
    """
    limit = None if encode is continuations.behind_dialogue else lm.config.max_length
    whole = [encode(lm, asked, said) for asked, said in zip(contexts, options, strict=True)]
    encoded = [[_last(one, limit) for one in item] for item in whole]
    width = max(map(len, encoded), default=0)
    totals, counts = np.full((len(encoded), width), -np.inf), np.zeros((len(encoded), width), int)
    letters = [i for i, item in enumerate(encoded) if _differ_in_last_token(item)]
    for i, (said, tokens) in zip(
        letters, _score_letters(lm, [encoded[i] for i in letters], max_length), strict=True
    ):
        totals[i, : len(said)], counts[i, : len(said)] = said, tokens
    places = [(i, j) for i in set(range(len(encoded))) - set(letters) for j in range(width)]
    places = sorted((i, j) for i, j in places if j < len(encoded[i]))
    rows = [encoded[i][j] for i, j in places]
    for chosen, seq in _by_length([len(e.ids) for e in rows], max_length):
        said, tokens = score_examples(lm, [rows[r] for r in chosen], seq)
        for r, total, count in zip(chosen, said, tokens, strict=True):
            totals[places[r]], counts[places[r]] = total, count
    cut = [any(len(a.ids) > len(b.ids) for a, b in zip(*pair, strict=True))
           for pair in zip(whole, encoded, strict=True)]  # fmt: skip
    return Scores(totals, counts, np.array(cut, bool))


def _last(one: Encoded, limit: int | None) -> Encoded:
    """Returns the last `limit` tokens of an encoding, as lm-evaluation-harness cuts."""
    if limit is None or len(one.ids) <= limit:
        return one
    mask = one.loss_mask[-limit:].copy()
    mask[0] = False  # nothing is left before it
    return Encoded(one.ids[-limit:], mask, one.notes)


def _differ_in_last_token(item: Sequence[Encoded]) -> bool:
    """Whether the options of an item are one token each, behind the same tokens."""
    first = item[0].ids[:-1]
    return all(e.loss_mask.sum() == 1 and e.loss_mask[-1] for e in item) and all(
        np.array_equal(first, e.ids[:-1]) for e in item
    )


def _by_length(sizes: Sequence[int], max_length: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yields `(indices, tokens of a row)`: what fits `max_length`, what fits twice that, and on.

    The few that are longer are scored apart, so that they widen no other row.
    """
    sizes = np.asarray(sizes, int)
    low, high = 0, max_length
    while low < sizes.max(initial=0):
        if (chosen := np.flatnonzero((low < sizes) & (sizes <= high))).size:
            yield chosen, max(max_length, packing.round_up(int(sizes[chosen].max())))
        low, high = high, 2 * high


def _score_letters(
    lm: LanguageModel, items: Sequence[Sequence[Encoded]], max_length: int
) -> list[tuple[np.ndarray, int]]:
    """Scores options of one token, all of an item in one row.

    Returns:
      For each item `(log-likelihoods float64 [options], 1)`.
    """
    lm, firsts = lm.on_one_device(), [item[0] for item in items]
    width, scores = max(map(len, items), default=0), [np.zeros(0)] * len(items)
    for chosen, seq in _by_length([len(e.ids) for e in firsts], max_length):
        rows = packing.assign_rows([len(firsts[i].ids) for i in chosen], seq)
        count = max(1, BATCH_ROWS * max_length // seq)
        for start in range(0, len(rows), count):
            members = [[int(chosen[m]) for m in row] for row in rows[start : start + count]]
            batch = packing.fill(firsts, members, count, seq)
            targets = np.repeat(batch.targets[None], width, axis=0)
            places = {}
            for r, row in enumerate(members):
                ends = np.cumsum([len(firsts[i].ids) for i in row])
                for i, end in zip(row, ends, strict=True):
                    places[i] = r, int(end) - 2  # the token that the option follows
                    for j, option in enumerate(items[i]):
                        targets[(j, *places[i])] = option.ids[-1]
            nll = fetch(_score_options(lm.model, lm.params, lm.factors, batch, targets))
            for i, (r, place) in places.items():
                scores[i] = -nll[: len(items[i]), r, place].astype(np.float64)
    return [(one, 1) for one in scores]
