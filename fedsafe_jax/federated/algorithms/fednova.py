"""FedNova: FedAvg in which an update counts per local step, and the mean is scaled back.

"Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization" (Wang et al.,
2020, arXiv 2007.07481), Equation 6 for plain SGD: `x += (sum_k w_k tau_k) sum_k w_k (y_k - x) /
tau_k`. Steps without targets do not count, so clients that run out of data differ in `tau_k` too.
Under other optimizers it is the same formula; the paper's other normalisers are not here.
"""

from fedsafe_jax.federated.algorithms import fedavg
from fedsafe_jax.federated.algorithms.base import Algorithm

FEDNOVA = Algorithm(fedavg.make, normalize_steps=True)
