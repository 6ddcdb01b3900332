"""No attack: the requests as they are, which every attack is compared with."""

from collections.abc import Sequence

import jax

from fedsafe_jax.attacks.contract import Attack, Attacked, AttackPrompt, Settings, without_search
from fedsafe_jax.data.examples import Example
from fedsafe_jax.inference.language_model import LanguageModel


def attack(
    models: Sequence[LanguageModel],
    requests: Sequence[Example],
    targets: Sequence[Sequence[str]],
    settings: Settings,
    key: jax.Array,
) -> Attacked:
    """Returns the requests; arguments as in `Attack.run`."""
    del models, targets, settings, key
    return without_search([[AttackPrompt(request.messages)] for request in requests])


DIRECT = Attack(attack)
