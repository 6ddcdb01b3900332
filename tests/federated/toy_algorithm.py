"""A toy algorithm as a third party writes it: one file, registered when it is imported."""

import optax

from fedsafe_jax.federated.algorithms import ALGORITHMS, Algorithm, fedopt


def make(training, num_clients, hyperparameters):
    """Returns FedAvg whose server takes steps of one length: x += rate D / |D|."""
    rate = hyperparameters.adaptive_learning_rate
    unit = optax.normalize_by_update_norm(eps=1e-12)
    return fedopt(training, optax.chain(unit, optax.scale(-rate)))


ALGORITHMS["toy_unit"] = Algorithm(make, weighting="uniform")
