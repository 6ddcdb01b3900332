"""HetLoRA's weights: FedAvg in which a client counts by the length of what its factors do.

"Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models" (Cho et al., 2024,
arXiv 2401.06432): `w_k = |a_k b_k| / sum_j |a_j b_j|` in the Frobenius norm, whatever a
client holds. The lengths are of the whole adapter under the one scale `alpha / lora_rank`, so ranks
do not change their unit. Smaller ranks are prefixes (`client_ranks`), as in the paper; its pruning
of ranks is not here.
"""

from fedsafe_jax.federated.algorithms import fedavg
from fedsafe_jax.federated.algorithms.base import Algorithm

REFUSES = {"federated.noise_multiplier": "noise is set for clients that all weigh the same"}
HETLORA = Algorithm(fedavg.make, weighting="product_norm", sites=False, refuses=REFUSES)
