"""Sign flipping: malicious clients send their update turned around, times the boost.

"RSA: Byzantine-Robust Stochastic Aggregation Methods for Distributed Learning from Heterogeneous
Datasets" (Li et al., 2019, arXiv 1811.03761), Section 5.
"""

from fedsafe_jax.federated.attackers.base import Attacker

SIGN_FLIP = Attacker(lambda boost: -float(boost))
