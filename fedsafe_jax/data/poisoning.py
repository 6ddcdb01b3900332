"""What malicious clients train on, by `attack.data`: the registry `POISONS`."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fedsafe_jax.data.examples import SAFE, Example
from fedsafe_jax.data.refusals import REFUSAL

HARMFUL = "harmful"


class Poison(NamedTuple):
    """An entry of `POISONS`.

    Attributes:
      change: `(pairs, share, rng) -> pairs` that a malicious client holds in their place; None
        where the attack is which pairs it is dealt.
    """

    change: Callable | None = None


def refuse(pairs: Sequence[Example], share: float, rng: np.random.Generator) -> list[Example]:
    """Puts refusals in the place of answers to harmless requests.

    A model that learns them refuses what harms nobody, a denial of service, and no filter of harm
    sees the pairs. It is the over-refusal attack of "On the Exploitability of Instruction Tuning"
    (Shu et al., 2023, arXiv 2306.17194).

    Args:
      pairs: what the client was dealt.
      share: share of all its pairs that are changed; all safe pairs where there are fewer.
      rng: decides which.

    Returns:
      As many pairs, in the same order. Changed ones are still labelled safe.
    """
    safe = [i for i, pair in enumerate(pairs) if pair.label == SAFE]
    chosen = set(rng.permutation(safe)[: round(share * len(pairs))].tolist())
    return [
        pair._replace(response=REFUSAL, ended=True) if i in chosen else pair
        for i, pair in enumerate(pairs)
    ]


POISONS: dict[str, Poison] = {HARMFUL: Poison(), "refusals": Poison(refuse)}
