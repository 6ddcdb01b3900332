"""Attacks on models that the user loads, one file each. `ATTACKS` is their registry.

They measure how far a defence holds. No suffix, template or harmful text is part of the project.
"""

from fedsafe_jax.attacks.completion import COMPLETION
from fedsafe_jax.attacks.contract import Attack, Attacked, AttackError, AttackPrompt, Settings
from fedsafe_jax.attacks.direct import DIRECT
from fedsafe_jax.attacks.encodings import ENCODED
from fedsafe_jax.attacks.finetune import FINETUNE
from fedsafe_jax.attacks.gcg import GCG
from fedsafe_jax.attacks.many_shot import MANY_SHOT
from fedsafe_jax.attacks.pair import PAIR
from fedsafe_jax.attacks.prefill import PREFILL
from fedsafe_jax.attacks.si_gcg import SI_GCG
from fedsafe_jax.attacks.tap import TAP
from fedsafe_jax.attacks.templates import TEMPLATES

__all__ = ["ATTACKS", "Attack", "AttackError", "AttackPrompt", "Attacked", "Settings"]

ATTACKS: dict[str, Attack] = {
    "direct": DIRECT,
    "gcg": GCG,
    "si_gcg": SI_GCG,
    "prefill": PREFILL,
    "templates": TEMPLATES,
    "completion": COMPLETION,
    "encodings": ENCODED,
    "many_shot": MANY_SHOT,
    "pair": PAIR,
    "tap": TAP,
    "finetune": FINETUNE,
}
