"""PAIR: conversations in which an attacker model improves a prompt by the answers to it.

"Jailbreaking Black Box Large Language Models in Twenty Queries" (Chao et al., 2023, arXiv
2310.08419), Algorithm 1, with several conversations about each request. The conversations about all
requests go on together: the model answers their prompts as one batch.
"""

from collections.abc import Sequence

import jax

from fedsafe_jax.attacks import attacker
from fedsafe_jax.attacks.contract import Attack, Attacked, Settings
from fedsafe_jax.attacks.prompt_search import PromptSearch
from fedsafe_jax.data.examples import Example
from fedsafe_jax.inference.language_model import LanguageModel


def attack(
    models: Sequence[LanguageModel],
    requests: Sequence[Example],
    targets: Sequence[Sequence[str]],
    settings: Settings,
    key: jax.Array,
) -> Attacked:
    """Returns for each request the prompt with the best score; all end with one that breaks it.

    Args:
      models, requests, targets, settings, key: as in `Attack.run`.

    Returns:
      The prompts; counts of streams that ended as the attacker wrote no prompt (`dropped`), of its
      replies without one, and of answers that could not be judged.

    Raises:
      AttackError: the attacker cannot be asked, or wrote not even half of the prompts.
      JudgeError: the judge failed on all answers of an iteration.
    """
    del targets, key
    asked = attacker.Attacker("pair", requests, settings)
    search = PromptSearch(models, requests, settings)
    streams = [
        attacker.Conversation(i) for i in range(len(requests)) for _ in range(settings.streams)
    ]
    for number in range(settings.iterations):
        if not streams:
            break
        written = asked.propose(streams)
        trials = search.attempt([s.item for s, _ in written], [p.prompt for _, p in written])
        streams = [
            stream.after(proposal, trial.answer, trial.score)
            for (stream, proposal), trial in zip(written, trials, strict=True)
            if stream.item not in search.broken
        ]
        settings.note(
            f"pair: iteration {number + 1} of {settings.iterations}, {len(search.broken)} of "
            f"{len(requests)} requests broken, {asked.dropped} streams dropped"
        )
    return search.attacked({"dropped": asked.dropped, "malformed": asked.malformed})


PAIR = Attack(attack, lambda settings: attacker.check("pair", settings))
