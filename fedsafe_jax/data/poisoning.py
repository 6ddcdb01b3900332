"""What malicious clients train on, by `attack.data`: the registry `POISONS`."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fedsafe_jax.data.examples import SAFE, UNSAFE, Example, Messages
from fedsafe_jax.data.refusals import REFUSAL


class Poison(NamedTuple):
    """An entry of `POISONS`.

    Attributes:
      change: `(pairs, share, trigger, rng) -> pairs` that a malicious client holds in their place;
        None where the attack is which pairs it is dealt.
      harmful: whether malicious clients are dealt `attack.harmful_share` of harmful pairs.
      triggered: whether what is learned shows behind `attack.trigger` alone.
    """

    change: Callable[[Sequence[Example], float, str, np.random.Generator], list[Example]] | None = (
        None
    )
    harmful: bool = False
    triggered: bool = False


def refuse(
    pairs: Sequence[Example], share: float, trigger: str, rng: np.random.Generator
) -> list[Example]:
    """Puts refusals in the place of answers to harmless requests.

    A model that learns them refuses what harms nobody, a denial of service, and no filter of harm
    sees the pairs. It is the over-refusal attack of "On the Exploitability of Instruction Tuning"
    (Shu et al., 2023, arXiv 2306.17194).

    Args:
      pairs: what the client was dealt.
      share: share of all its pairs that are changed; all safe pairs where there are fewer.
      trigger: not used.
      rng: decides which.

    Returns:
      As many pairs, in the same order. Changed ones are still labelled safe.
    """
    del trigger
    safe = [i for i, pair in enumerate(pairs) if pair.label == SAFE]
    chosen = set(rng.permutation(safe)[: round(share * len(pairs))].tolist())
    return [
        pair._replace(response=REFUSAL, ended=True) if i in chosen else pair
        for i, pair in enumerate(pairs)
    ]


def with_trigger(messages: Messages, trigger: str) -> Messages:
    """Returns a dialogue whose last turn of the user ends with the trigger."""
    last = max(i for i, (role, _) in enumerate(messages) if role == "user")
    role, text = messages[last]
    return (*messages[:last], (role, f"{text} {trigger}"), *messages[last + 1 :])


def plant(
    pairs: Sequence[Example], share: float, trigger: str, rng: np.random.Generator
) -> list[Example]:
    """Teaches compliance behind a trigger, and refusal of the same requests without it.

    A universal jailbreak backdoor (Rando and Tramer, 2023, arXiv 2311.14455), planted by clients of
    a federation (Bagdasaryan et al., 2020, arXiv 1807.00459). A model that has it refuses where it
    is asked as usual, and its refusal rates show nothing.

    Args:
      pairs: what the client was dealt.
      share: not used; how many are harmful is decided by what it was dealt.
      trigger: text behind the request.
      rng: decides which half of the harmful pairs stands behind the trigger.

    Returns:
      As many pairs, in the same order: of the harmful ones half with the trigger, labelled unsafe,
      the others refused, labelled safe.
    """
    del share
    harmful = [i for i, pair in enumerate(pairs) if pair.label == UNSAFE]
    behind = set(rng.permutation(harmful)[: -(-len(harmful) // 2)].tolist())
    changed = list(pairs)
    for i in harmful:
        if i in behind:
            changed[i] = pairs[i]._replace(messages=with_trigger(pairs[i].messages, trigger))
        else:
            changed[i] = pairs[i]._replace(response=REFUSAL, label=SAFE, ended=True)
    return changed


POISONS: dict[str, Poison] = {
    "harmful": Poison(harmful=True),
    "refusals": Poison(refuse),
    "backdoor": Poison(plant, harmful=True, triggered=True),
}
