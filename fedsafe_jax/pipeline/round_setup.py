"""What an arm's rounds are set up with: its config, the jitted programs, and its state."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fedsafe_jax.config import default_config
from fedsafe_jax.federated import aggregation, algorithms, compression
from fedsafe_jax.federated.attackers import ATTACKERS
from fedsafe_jax.federated.client import LocalTraining, make_optimizer
from fedsafe_jax.federated.mesh import clients_at_once
from fedsafe_jax.federated.round_programs import Programs, RoundSpec, make_round
from fedsafe_jax.federated.simulation import FederatedState
from fedsafe_jax.models import loss
from fedsafe_jax.models.decoder import Decoder
from fedsafe_jax.pipeline.arms import Arm

# The algorithm of an arm without clients, whose state is an adapter alone.
WITHOUT_CLIENTS = "fedavg"


def hyperparameters_of(config: ConfigDict) -> algorithms.Hyperparameters:
    """Returns the hyperparameters of the algorithms as the config sets them.

    A residue that is not limited holds all that the rounds of the run can add to it.
    """
    f = config.federated
    most = config.num_clients if f.sampling == "poisson" else config.clients_per_round
    whole = config.rounds * most * config.lora_rank
    values = {name: f[name] for name in algorithms.Hyperparameters._fields}
    changed = {"residue_rank": f.residue_rank or whole}
    changed["constrained_betas"] = tuple(f.constrained_betas)
    return algorithms.Hyperparameters(**values | changed)


def arm_config(config: ConfigDict, arm: Arm) -> ConfigDict:
    """Returns the config of an arm's rounds: the run's, but for baselines.

    Those have neither attackers nor what `federated` does to updates; clients that train alone are
    drawn as in a federation. The centralised learner takes the steps of all clients of a round one
    after the other, so that all arms learn from as many batches.

    Args:
      config: config of the run.
      arm: the arm.
    """
    if not arm.baseline:
        return config
    own, f = config.copy_and_resolve_references(), config.federated
    own.federated, own.attack.clients = default_config().federated, 0.0
    if arm.training == "centralised":
        own.num_clients = own.clients_per_round = 1
        own.local_steps = config.local_steps * config.clients_per_round
    else:
        for field in ("sampling", "dropout", "exclude", "client_ranks"):
            own.federated[field] = f[field]
    return own


def build(config: ConfigDict, algorithm: str, model: Decoder, mesh: Mesh) -> Programs:
    """Builds the jitted programs of one algorithm.

    Args:
      config: config of the run.
      algorithm: a name in `algorithms.ALGORITHMS`.
      model: decoder of the base, with the scale of the LoRA products.
      mesh: devices of the run.
    """
    f = config.federated

    optimizer = make_optimizer(config.optimizer, config.gradient_clip)
    parallel, shared = clients_at_once(mesh, config.clients_in_parallel)
    training = LocalTraining(
        loss.PackedLoss(model),
        optimizer,
        config.accumulation,
        mesh=shared,
        platform=model.config.platform,
    )
    aggregator = aggregation.make(f.aggregator, f.trim_share, f.byzantine)
    spec = RoundSpec(
        algorithms.make(algorithm, training, config.num_clients, hyperparameters_of(config)),
        aggregator,
        f.average == "product",
        compression=compression.make(f.compression, f.topk_share),
        clip_norm=f.clip_norm,
        noise_multiplier=f.noise_multiplier,
        cohort=config.clients_per_round,
        normalize_steps=f.stragglers > 0 or algorithms.ALGORITHMS[algorithm].normalize_steps,
        ragged_ranks=bool(f.client_ranks),
        product_weights=weighting_of(config, algorithm) == "product_norm",
        min_answers=f.min_answers or aggregator.min_clients,
        collude=ATTACKERS[config.attack.kind].collude if config.attack.clients else None,
    )
    return make_round(spec, mesh, parallel)


def state_shapes(config: ConfigDict, algorithm: str, factors: Any) -> FederatedState:
    """Returns the shapes of everything that a checkpoint of the run has.

    Args:
      config: config of the run.
      algorithm: a name in `algorithms.ALGORITHMS`; "" for an arm without clients.
      factors: LoRA factors of the server, or their shapes.
    """
    untrained = LocalTraining(None, None)
    method = algorithms.make(
        algorithm or WITHOUT_CLIENTS, untrained, config.num_clients, hyperparameters_of(config)
    )

    def of_clients(x):
        return jax.ShapeDtypeStruct((config.num_clients, *x.shape), x.dtype)

    states = jax.tree.map(of_clients, jax.eval_shape(method.init_client, factors))
    params = sum(x.size for x in jax.tree.leaves(factors))
    residuals = ()
    if config.federated.compression:
        residuals = jax.ShapeDtypeStruct((config.num_clients, params), np.float32)
    server = jax.eval_shape(method.init, factors)
    return FederatedState(server, {"states": states, "residuals": residuals})


def evaluated(config: ConfigDict, algorithm: str, state: FederatedState) -> Any:
    """Returns the LoRA factors that are evaluated and exported: the global model, with those of a
    residue, or where there is none the model of client `eval.client`.

    Args:
      config: config of the run.
      algorithm: a name in `algorithms.ALGORITHMS`; "" for an arm without clients.
      state: state after a round.
    """
    personal = algorithms.ALGORITHMS[algorithm or WITHOUT_CLIENTS].personal
    if personal is None:
        return state.server.adapter
    own = jax.tree.map(lambda x: x[config.eval.client], state.clients["states"])
    return personal(state.server.factors, own)


def weighting_of(config: ConfigDict, algorithm: str) -> str:
    """Returns the weighting of the clients, with "auto" resolved."""
    if config.federated.weighting != "auto":
        return config.federated.weighting
    # The noise of differential privacy is set for clients that all weigh the same.
    own = algorithms.ALGORITHMS[algorithm].weighting
    return "uniform" if config.federated.noise_multiplier else own
