"""Constitutional AI: constitution, revision loop, losses, training and schedules.

The loop itself is `revise.revise`; it is not exported here, where `revise` is the module.
"""

from fedsafe_jax.cai.losses import LOSSES, Loss, Ratios, dpo, ipo, kto
from fedsafe_jax.cai.revise import Generate, Judge, Record, Rules, tally
from fedsafe_jax.cai.steps import Pairs, Recipe, Step, make_steps
from fedsafe_jax.cai.train import make_step, preference_losses

__all__ = [
    "LOSSES",
    "Generate",
    "Judge",
    "Loss",
    "Pairs",
    "Ratios",
    "Recipe",
    "Record",
    "Rules",
    "Step",
    "dpo",
    "ipo",
    "kto",
    "make_step",
    "make_steps",
    "preference_losses",
    "tally",
]
