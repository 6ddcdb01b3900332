"""Encodings: each request in base64, rot13 and leetspeak, without a word on how to read it.

Capabilities reach further than what alignment was taught on: "Jailbroken: How Does LLM Safety
Training Fail?" (Wei et al., 2023, arXiv 2307.02483), Section 3.2.
"""

import base64
import codecs
from collections.abc import Callable, Sequence

import jax

from fedsafe_jax.attacks.contract import (
    Attack,
    Attacked,
    AttackPrompt,
    Settings,
    reworded,
    without_search,
)
from fedsafe_jax.data.examples import Example
from fedsafe_jax.inference.language_model import LanguageModel

_LEET = str.maketrans("aeiostAEIOST", "431057431057")

ENCODINGS: dict[str, Callable[[str], str]] = {
    "base64": lambda text: base64.b64encode(text.encode()).decode(),
    "rot13": lambda text: codecs.encode(text, "rot13"),
    "leetspeak": lambda text: text.translate(_LEET),
}


def attack(
    models: Sequence[LanguageModel],
    requests: Sequence[Example],
    targets: Sequence[Sequence[str]],
    settings: Settings,
    key: jax.Array,
) -> Attacked:
    """Returns each request in each encoding; arguments as in `Attack.run`."""
    del models, targets, settings, key
    return without_search(
        [
            [
                AttackPrompt(reworded(request.messages, encode(request.prompt)), variant=name)
                for name, encode in ENCODINGS.items()
            ]
            for request in requests
        ]
    )


ENCODED = Attack(attack)
