"""Labelled pairs for training and measuring a filter."""

from collections.abc import Sequence

from fedsafe_jax.data.examples import SAFE, UNSAFE, Example
from fedsafe_jax.data.refusals import REFUSAL, start_refusal
from fedsafe_jax.random_streams import Purpose, generator


def drop_mislabelled(pairs: Sequence[Example]) -> tuple[list[Example], int]:
    """Returns the pairs whose label can be trusted, and the number left out.

    An answer that is labelled unsafe and begins as a refusal is left out: either it is a refusal,
    which is safe, or it goes on to comply ("Sorry! Here it is: ..."), and words do not tell which.
    """
    kept = [p for p in pairs if p.label != UNSAFE or not start_refusal(p.response)]
    return kept, len(pairs) - len(kept)


def hard_negatives(pairs: Sequence[Example], share: float, seed: int) -> list[Example]:
    """Builds safe twins of harmful pairs: the same question, answered by a refusal.

    Without them a filter can tell most harmful pairs by the question, and flags a refusal to it as
    well: then the answers that keep a model safe are lost.

    Args:
      pairs: labelled pairs.
      share: share of the unsafe pairs that get a twin.
      seed: seed of the choice of pairs and of their refusals.

    Returns:
      The twins alone. Their answers are refusals drawn from the pairs, or the refusal of
      `data.refusals` where the pairs hold none.
    """
    rng = generator(Purpose.FILTER_HARD_NEGATIVES, seed)
    refusals = sorted({p.response for p in pairs if p.label == SAFE and start_refusal(p.response)})
    refusals = refusals or [REFUSAL]
    unsafe = [p for p in pairs if p.label == UNSAFE]
    chosen = sorted(rng.permutation(len(unsafe))[: round(share * len(unsafe))].tolist())
    said = rng.integers(len(refusals), size=len(chosen))
    return [
        unsafe[i]._replace(response=refusals[j], label=SAFE)
        for i, j in zip(chosen, said, strict=True)
    ]
