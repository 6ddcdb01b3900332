"""Simulated attackers: a file each, and the registry `ATTACKERS` by which a config names them.

An attacker from elsewhere is one more entry: `ATTACKERS["mine"] = Attacker(factor, collude)`.
"""

from fedsafe_jax.federated.attackers.base import Attacker
from fedsafe_jax.federated.attackers.boost import BOOST
from fedsafe_jax.federated.attackers.scaled import SCALED
from fedsafe_jax.federated.attackers.sign_flip import SIGN_FLIP
from fedsafe_jax.federated.attackers.within_spread import MIN_MAX, MIN_SUM

ATTACKERS: dict[str, Attacker] = {
    "boost": BOOST,
    "min_max": MIN_MAX,
    "min_sum": MIN_SUM,
    "scaled": SCALED,
    "sign_flip": SIGN_FLIP,
}

__all__ = ["ATTACKERS", "Attacker"]
