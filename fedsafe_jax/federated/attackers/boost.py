"""Model replacement: malicious clients multiply their updates.

"How To Backdoor Federated Learning" (Bagdasaryan et al., 2020, arXiv 1807.00459), Equation 3. A
factor of 1 poisons by data alone: the client is honest but for what it learns from.
"""

from fedsafe_jax.federated.attackers.base import Attacker

BOOST = Attacker(float)
