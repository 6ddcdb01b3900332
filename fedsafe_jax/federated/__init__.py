"""Federated training of LoRA factors: algorithms, aggregators, clients and the round.

`make_round(RoundSpec(algorithm, aggregator), mesh)` builds a round's programs, `run_round` runs a
cohort through them. The room knows nothing of text: a client's batches and loss are arguments.
"""

from fedsafe_jax.federated.aggregation import AGGREGATORS, Aggregator
from fedsafe_jax.federated.algorithms import (
    ALGORITHMS,
    Algorithm,
    ClientUpdate,
    FederatedAlgorithm,
    Hyperparameters,
    ServerState,
    fedopt,
)
from fedsafe_jax.federated.client import LocalTraining, local_training, make_optimizer
from fedsafe_jax.federated.compression import COMPRESSIONS, Compression
from fedsafe_jax.federated.mesh import make_mesh
from fedsafe_jax.federated.participation import SAMPLINGS, Cohort, Sampling, draw_cohort
from fedsafe_jax.federated.privacy import epsilon
from fedsafe_jax.federated.round_programs import Programs, RoundSpec, make_round
from fedsafe_jax.federated.simulation import (
    FederatedState,
    RoundReport,
    initial_state,
    run_round,
)

__all__ = [
    "AGGREGATORS",
    "ALGORITHMS",
    "COMPRESSIONS",
    "SAMPLINGS",
    "Aggregator",
    "Algorithm",
    "ClientUpdate",
    "Cohort",
    "Compression",
    "FederatedAlgorithm",
    "FederatedState",
    "Hyperparameters",
    "LocalTraining",
    "Programs",
    "RoundReport",
    "RoundSpec",
    "Sampling",
    "ServerState",
    "draw_cohort",
    "epsilon",
    "fedopt",
    "initial_state",
    "local_training",
    "make_mesh",
    "make_optimizer",
    "make_round",
    "run_round",
]
