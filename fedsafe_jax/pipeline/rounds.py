"""From a config to the federated rounds of a run: programs, clients' roles, a round's figures."""

from typing import NamedTuple

import jax
import numpy as np

from fedsafe_jax.data import partition
from fedsafe_jax.data.batches import RoundBatches
from fedsafe_jax.federated import (
    aggregation,
    algorithms,
    compression,
    participation,
    privacy,
    simulation,
)
from fedsafe_jax.federated.client import LocalTraining, make_optimizer
from fedsafe_jax.federated.mesh import clients_at_once
from fedsafe_jax.federated.round_programs import Programs, RoundSpec, make_round
from fedsafe_jax.federated.simulation import FederatedState, RoundReport
from fedsafe_jax.models import loss
from fedsafe_jax.models.decoder import Decoder
from fedsafe_jax.models.sharding import CLIENTS


class Roles(NamedTuple):
    """What distinguishes the clients of a seed.

    Attributes:
      malicious: ids of the clients that hold `attack.harmful_share` and multiply their updates.
      ranks: int32 `[num_clients]`, of their adapters.
    """

    malicious: tuple[int, ...]
    ranks: np.ndarray


def roles(config, seed: int) -> Roles:
    """Who is malicious, and who has which rank."""
    ranks = config.federated.client_ranks or (config.lora_rank,)
    return Roles(
        participation.malicious_clients(seed, config.num_clients, config.attack.clients),
        np.array([ranks[i % len(ranks)] for i in range(config.num_clients)], np.int32),
    )


def split(config, safe, unsafe, seed: int) -> list:
    """Deals the pools to the clients of a seed.

    Raises:
      PartitionError: they cannot be dealt so.
    """
    rng, bad = np.random.default_rng([seed, 7]), set(roles(config, seed).malicious)
    shares = [
        config.attack.harmful_share if i in bad else config.harmful_share
        for i in range(config.num_clients)
    ]
    sizes = partition.client_sizes(
        config.num_clients, config.examples_per_client, config.size_sigma, rng
    )
    return partition.partition(
        safe, unsafe, sizes, shares, config.partition, rng, config.dirichlet_alpha
    )


def build(config, algorithm: str, model: Decoder, mesh) -> Programs:
    """The jitted programs of one algorithm."""
    f = config.federated

    def loss_fn(adapter, base, batch):
        return loss.packed_loss(model, adapter, base, batch)

    optimizer = make_optimizer(config.optimizer, config.gradient_clip)
    parallel, shared = clients_at_once(mesh, config.clients_in_parallel, config.clients_per_round)
    training = LocalTraining(loss_fn, optimizer, config.accumulation, shared)
    settings = algorithms.Settings(
        f.server_learning_rate,
        f.adaptive_learning_rate,
        f.beta1,
        f.beta2,
        f.tau,
        f.prox_mu,
        f.scaffold,
        f.second_moment,
        f.first_moment,
    )
    spec = RoundSpec(
        algorithms.make(algorithm, training, config.num_clients, settings),
        aggregation.make(f.aggregator, f.trim_share, f.byzantine),
        f.average == "product",
        compression.make(f.compression, f.topk_share),
        f.clip_norm,
        f.noise_multiplier,
        config.clients_per_round,
        f.stragglers > 0,
        bool(f.client_ranks),
    )
    return make_round(spec, mesh, parallel)


def rate(config, t: int) -> float:
    """The learning rate of round `t`, from `learning_rate` to `min_learning_rate`."""
    low, high = config.min_learning_rate, config.learning_rate
    if t < config.warmup_rounds:
        return high * (t + 1) / (config.warmup_rounds + 1)
    done = (t - config.warmup_rounds) / (config.rounds - config.warmup_rounds)
    return low + (high - low) * _falling(config.schedule, done)


def step_rates(config, t: int) -> np.ndarray:
    """The learning rate of each local step of round `t`, float32 `[local_steps]`."""
    steps = np.arange(config.local_steps) / config.local_steps
    return (rate(config, t) * _falling(config.step_schedule, steps)).astype(np.float32)


def _falling(schedule: str, done):
    """From 1 at 0 towards 0 at 1."""
    if schedule == "cosine":  # OpenFedLLM's, over rounds
        return 0.5 * (1 + np.cos(np.pi * done))
    return 1 - done if schedule == "linear" else 1.0 + 0 * done


def draw_cohort(config, algorithm: str, sizes, seed: int, t: int) -> participation.Cohort:
    """Who takes part in round `t`, of clients with so many examples."""
    f = config.federated
    weighting = f.weighting
    if weighting == "auto":
        # What the papers do: adaptive server optimizers see the plain mean.
        adaptive = algorithm in ("fedadagrad", "fedyogi", "fedadam")
        weighting = "uniform" if adaptive or f.noise_multiplier else "examples"
    return participation.draw_cohort(
        seed,
        t,
        sizes,
        config.clients_per_round,
        config.local_steps,
        f.sampling,
        weighting,
        f.dropout,
        f.stragglers,
    )


def local_batches(config, data, seed: int, t: int, ids, steps) -> RoundBatches:
    """What clients `ids` train on in round `t`; `data` holds their encoded examples by id."""
    return RoundBatches(
        data,
        seed,
        t,
        ids,
        steps,
        config.local_steps,
        config.batch_size,
        config.seq_len,
        config.accumulation,
        "openfedllm" if config.federated.sampling == "openfedllm" else "shuffle",
    )


def run(
    config, algorithm: str, programs: Programs, state: FederatedState, base, data, seed: int, t: int
) -> tuple[FederatedState, dict]:
    """One round.

    Args:
      config, algorithm, programs: of the run.
      state: before the round.
      base: frozen base parameters.
      data: encoded examples of every client.
      seed, t: sampling, order and noise depend on nothing else.

    Returns:
      The state after the round, and its figures, a line of `metrics.jsonl`.
    """
    cohort = draw_cohort(config, algorithm, [len(examples) for examples in data], seed, t)
    batches = local_batches(config, data, seed, t, cohort.ids, cohort.steps)
    useful = 0

    def packed(start, stop):
        nonlocal useful
        batch = batches.chunk(start, stop)
        useful += int((batch.segment_ids > 0).sum())
        return batch

    state, report = step(config, programs, state, base, packed, cohort, seed, t)
    return state, figures(config, cohort, report, useful, seed, t)


def step(
    config, programs: Programs, state: FederatedState, base, packed, cohort, seed: int, t: int
) -> tuple[FederatedState, RoundReport]:
    """Training and the server's step, of a cohort whose batches `packed(start, stop)` gives."""
    who = roles(config, seed)
    boosts = np.where(np.isin(cohort.ids, who.malicious), config.attack.boost, 1.0)
    devices = programs.mesh.shape[CLIENTS]
    return simulation.run_round(
        programs,
        state,
        base,
        packed,
        cohort,
        step_rates(config, t),
        jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), t), 9),
        simulation.chunk_size(config.clients_per_round, devices, config.chunk_clients),
        boosts.astype(np.float32),
        who.ranks[cohort.ids],
    )


def figures(config, cohort, report: RoundReport, useful: int, seed: int, t: int) -> dict:
    """Of a round, for `metrics.jsonl`."""
    f, who = config.federated, roles(config, seed)
    row = {
        "loss": report.loss,
        "loss_last_step": report.loss_last_step,
        "clients": cohort.ids.tolist(),
        "delta_norms": report.norms.tolist(),
        "cosines": report.cosines.tolist(),
        "update_norm": report.update_norm,
        "product_gap": report.product_gap,
        "useful_tokens": useful,
        "bytes_up": report.bytes_up,
        "bytes_down": report.bytes_down,
        "no_data": list(cohort.no_data),
        "excluded": list(report.excluded),
        "skipped": report.skipped,
    }
    # JSON has no NaN.
    row = {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in row.items()}
    if f.dropout:
        row["dropped_out"] = list(cohort.dropped_out)
    if f.stragglers:
        row["steps"] = cohort.steps.tolist()
    if config.attack.clients:
        row["malicious"] = [i for i in cohort.ids.tolist() if i in who.malicious]
    if f.noise_multiplier:
        row["epsilon"] = privacy.epsilon(
            t + 1,
            config.num_clients,
            config.clients_per_round,
            f.noise_multiplier,
            f.delta,
            f.sampling,
        )
    return row
