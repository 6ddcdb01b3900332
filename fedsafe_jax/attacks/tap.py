"""TAP: a tree of prompts, of which those that are off topic or score low are pruned.

"Tree of Attacks: Jailbreaking Black-Box LLMs Automatically" (Mehrotra et al., 2023, arXiv
2312.02119), Algorithm 1: each leaf grows branches, the evaluator prunes those that ask for another
thing before the model is asked, and of the others the best by score are kept. The trees of all
requests grow together: the model answers their prompts as one batch.
"""

from collections.abc import Sequence

import jax

from fedsafe_jax.attacks import attacker
from fedsafe_jax.attacks.attacker import Conversation
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
    """Returns for each request the prompt with the best score; a tree ends with one that breaks it.

    A tree of which no branch is left to ask keeps its leaves, which grow others at the next depth.

    Args:
      models, requests, targets, settings, key: as in `Attack.run`.

    Returns:
      The prompts; counts of branches that the attacker did not write (`dropped`), of its replies
      without a prompt, of branches pruned as `off_topic` and for their score (`pruned`), of replies
      of the evaluator that say nothing (`unread`), and of answers that could not be judged.

    Raises:
      AttackError, JudgeError: as `pair.attack`.
    """
    del targets, key
    asked = attacker.Attacker("tap", requests, settings)
    search = PromptSearch(models, requests, settings)
    leaves = {i: [Conversation(i)] for i in range(len(requests))}
    off_topic = pruned = 0
    for number in range(settings.depth):
        grown = [leaf for own in leaves.values() for leaf in own for _ in range(settings.branching)]
        if not grown:
            break
        written = asked.propose(grown)
        same = asked.same([leaf.item for leaf, _ in written], [p.prompt for _, p in written])
        kept = [branch for branch, on_topic in zip(written, same, strict=True) if on_topic]
        off_topic += len(written) - len(kept)
        trials = search.attempt([leaf.item for leaf, _ in kept], [p.prompt for _, p in kept])
        branches: dict[int, list[tuple[float, Conversation]]] = {}
        for (leaf, proposal), trial in zip(kept, trials, strict=True):
            after = leaf.after(proposal, trial.answer, trial.score)
            branches.setdefault(leaf.item, []).append((trial.score.value, after))
        for i in list(leaves):
            if i in search.broken:
                del leaves[i]
            elif i in branches:
                best = sorted(branches[i], key=lambda one: one[0], reverse=True)[: settings.width]
                pruned += len(branches[i]) - len(best)
                leaves[i] = [leaf for _, leaf in best]
        settings.note(
            f"tap: depth {number + 1} of {settings.depth}, {len(search.broken)} of "
            f"{len(requests)} requests broken, {off_topic} branches off topic"
        )
    counts = {"dropped": asked.dropped, "malformed": asked.malformed, "unread": asked.unread}
    return search.attacked(counts | {"off_topic": off_topic, "pruned": pruned})


TAP = Attack(attack, lambda settings: attacker.check("tap", settings))
