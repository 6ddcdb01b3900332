"""What the losses share that hold clients to a reference: FedAvg with another loss.

The reference is the global model of the round's start, whole: also for a client whose own factors
have a smaller rank. It is the base alone where `Hyperparameters.reference` says so.
"""

from collections.abc import Callable

import optax

from fedsafe_jax.federated.algorithms.base import FederatedAlgorithm, Hyperparameters, fedopt
from fedsafe_jax.federated.client import LocalTraining
from fedsafe_jax.models.reference_loss import Frozen, ReferenceLoss, Tokens

GLOBAL, BASE = "global", "base"
REFERENCES = (GLOBAL, BASE)


def make(
    training: LocalTraining, hyperparameters: Hyperparameters, of_tokens: Callable[[Tokens], object]
) -> FederatedAlgorithm:
    """Returns FedAvg whose clients minimise a loss that reads the reference.

    Args:
      training: its loss is a `models.loss.PackedLoss`, for the decoder.
      hyperparameters: `reference` and `server_learning_rate` are read.
      of_tokens: see `models.reference_loss.ReferenceLoss`.
    """
    optimizer = optax.sgd(hyperparameters.server_learning_rate)

    def client_update(server, client_state, start, base, batches, steps):
        loss = ReferenceLoss(training.loss_fn.model, of_tokens)
        held = fedopt(training._replace(loss_fn=loss), optimizer)
        fixed = server.adapter if hyperparameters.reference == GLOBAL else None
        frozen = Frozen(base, fixed)
        return held.client_update(server, client_state, start, frozen, batches, steps)

    return fedopt(training, optimizer)._replace(client_update=client_update)
