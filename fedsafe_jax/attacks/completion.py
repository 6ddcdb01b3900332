"""Completion: the request as plain text that goes on, without the form of a chat.

Alignment is taught in the chat template; without it a model may go on as a base model does. It is
the CompletingAttack of "Refuse Whenever You Feel Unsafe" (Yuan et al., 2024, arXiv 2407.09121),
whose text goes on with the beginning of an answer.
"""

from collections.abc import Sequence

import jax

from fedsafe_jax.attacks import prefill
from fedsafe_jax.attacks.contract import Attack, Attacked, Settings, without_search
from fedsafe_jax.data.examples import Example
from fedsafe_jax.inference.language_model import LanguageModel


def attack(
    models: Sequence[LanguageModel],
    requests: Sequence[Example],
    targets: Sequence[Sequence[str]],
    settings: Settings,
    key: jax.Array,
) -> Attacked:
    """Returns the prompts of `prefill`, as plain text; arguments as in `Attack.run`."""
    attacked = prefill.attack(models, requests, targets, settings=settings, key=key)
    return without_search([[p._replace(chat=False) for p in each] for each in attacked.prompts])


COMPLETION = Attack(attack)
