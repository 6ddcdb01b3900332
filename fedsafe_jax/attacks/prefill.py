"""Prefilling: the first tokens of an answer that complies are put into the model's mouth.

"Jailbreaking Leading Safety-Aligned LLMs with Simple Adaptive Attacks" (Andriushchenko et al.,
2024, arXiv 2404.02151); "Safety Alignment Should Be Made More Than Just a Few Tokens Deep" (Qi et
al., 2024, arXiv 2406.05946), Section 2.2.
"""

from collections.abc import Sequence

import jax

from fedsafe_jax.attacks.contract import Attack, Attacked, AttackPrompt, Settings, without_search
from fedsafe_jax.data.examples import Example
from fedsafe_jax.inference.language_model import LanguageModel


def beginning(lm: LanguageModel, answer: str, count: int) -> str:
    """Returns the text of the first `count` tokens of an answer."""
    ids = lm.tokenizer(answer, add_special_tokens=False)["input_ids"][:count]
    return lm.text(ids)


def attack(
    models: Sequence[LanguageModel],
    requests: Sequence[Example],
    targets: Sequence[Sequence[str]],
    settings: Settings,
    key: jax.Array,
) -> Attacked:
    """Returns each request with the beginning of each of its targets.

    Args:
      models, requests, targets, settings, key: as in `Attack.run`; tokens are those of the first
        model.
    """
    del key
    prompts = []
    for request, texts in zip(requests, targets, strict=True):
        begun = [beginning(models[0], text, settings.prefill_tokens) for text in texts]
        names = [f"target {n}" for n in range(1, len(begun) + 1)] if len(begun) > 1 else [""]
        prompts.append(
            [
                AttackPrompt(request.messages, begin=begin, variant=name)
                for begin, name in zip(begun, names, strict=True)
            ]
        )
    return without_search(prompts)


PREFILL = Attack(attack)
