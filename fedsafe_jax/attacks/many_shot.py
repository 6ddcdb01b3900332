"""Many shots: the request behind turns in which an assistant answers others like it.

"Many-shot Jailbreaking" (Anil et al., NeurIPS 2024). The turns are pairs of the user's own; here
they are turns of the chat's form, as a client of an API can send them.
"""

from collections.abc import Sequence

import jax

from fedsafe_jax.attacks.contract import (
    Attack,
    Attacked,
    AttackError,
    AttackPrompt,
    Settings,
    without_search,
)
from fedsafe_jax.data.examples import Example
from fedsafe_jax.inference.language_model import LanguageModel


def attack(
    models: Sequence[LanguageModel],
    requests: Sequence[Example],
    targets: Sequence[Sequence[str]],
    settings: Settings,
    key: jax.Array,
) -> Attacked:
    """Returns each request behind the first shots, once for each of `settings.shot_counts`.

    A shot that asks what the request asks is left out. Where a prompt does not fit into the model's
    context the oldest turns go first, so that the number of shots is then smaller.

    Args:
      models, requests, targets, settings, key: as in `Attack.run`.
    """
    del models, targets, key
    return without_search([_prompts(request, settings) for request in requests])


def _prompts(request: Example, settings: Settings) -> list[AttackPrompt]:
    """Returns the prompts of one request; counts that all shots cannot fill are all shots once."""
    shots = [shot for shot in settings.shots if shot[0] != request.prompt]
    counts = dict.fromkeys(min(count, len(shots)) for count in settings.shot_counts)
    # A system prompt stays in front.
    system = [turn for turn in request.messages[:1] if turn[0] == "system"]
    prompts = []
    for count in counts:
        said = [
            turn
            for question, answer in shots[:count]
            for turn in (("user", question), ("assistant", answer))
        ]
        messages = (*system, *said, *request.messages[len(system) :])
        prompts.append(AttackPrompt(messages, variant=f"{count} shots"))
    return prompts


def _check(settings: Settings) -> None:
    if not settings.shots:
        raise AttackError("'many_shot' needs pairs that the assistant is to have answered before.")


MANY_SHOT = Attack(attack, _check)
