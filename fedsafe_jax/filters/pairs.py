"""Labelled pairs for training and measuring a filter."""

from collections.abc import Callable, Sequence

from fedsafe_jax.data.examples import SAFE, UNSAFE, Example, Messages
from fedsafe_jax.data.refusals import REFUSAL
from fedsafe_jax.random_streams import Purpose, generator

# `(dialogues, answers) -> whether each answer refuses`.
Refuses = Callable[[Sequence[Messages], Sequence[str]], Sequence[bool]]


def drop_mislabelled(pairs: Sequence[Example], refuses: Refuses) -> tuple[list[Example], int]:
    """Returns the pairs whose label can be trusted, and the number left out.

    An answer that is labelled unsafe and refuses is left out: either it is a refusal, which is
    safe, or it goes on to comply ("Sorry! Here it is: ..."), and a judge does not tell which.

    Args:
      pairs: labelled pairs.
      refuses: judge of refusal.
    """
    unsafe = [i for i, pair in enumerate(pairs) if pair.label == UNSAFE]
    said = refuses([pairs[i].messages for i in unsafe], [pairs[i].response for i in unsafe])
    disputed = {i for i, refused in zip(unsafe, said, strict=True) if refused}
    return [pair for i, pair in enumerate(pairs) if i not in disputed], len(disputed)


def hard_negatives(
    pairs: Sequence[Example], share: float, seed: int, refuses: Refuses
) -> list[Example]:
    """Builds safe twins of harmful pairs: the same question, answered by a refusal.

    Without them a filter can tell most harmful pairs by the question, and flags a refusal to it as
    well: then the answers that keep a model safe are lost.

    Args:
      pairs: labelled pairs.
      share: share of the unsafe pairs that get a twin.
      seed: seed of the choice of pairs and of their refusals.
      refuses: judge of refusal, which tells the refusals among the safe answers.

    Returns:
      The twins alone. Their answers are refusals drawn from the pairs, or the refusal of
      `data.refusals` where the pairs hold none.
    """
    rng = generator(Purpose.FILTER_HARD_NEGATIVES, seed)
    safe = [p for p in pairs if p.label == SAFE]
    said_so = refuses([p.messages for p in safe], [p.response for p in safe])
    refusals = sorted({p.response for p, refused in zip(safe, said_so, strict=True) if refused})
    refusals = refusals or [REFUSAL]
    unsafe = [p for p in pairs if p.label == UNSAFE]
    chosen = sorted(rng.permutation(len(unsafe))[: round(share * len(unsafe))].tolist())
    said = rng.integers(len(refusals), size=len(chosen))
    return [
        unsafe[i]._replace(response=refusals[j], label=SAFE)
        for i, j in zip(chosen, said, strict=True)
    ]
