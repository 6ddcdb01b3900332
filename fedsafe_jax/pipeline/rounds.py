"""From a config to the federated rounds of a run: programs, clients' roles, a round's figures."""

import jax
import numpy as np

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
from fedsafe_jax.federated.schedules import LearningRates, step_rates
from fedsafe_jax.federated.simulation import FederatedState, RoundReport
from fedsafe_jax.models import loss
from fedsafe_jax.models.decoder import Decoder
from fedsafe_jax.models.sharding import CLIENTS
from fedsafe_jax.pipeline.clients import roles


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
        beta2=f.beta2,
        tau=f.tau,
        prox_mu=f.prox_mu,
        scaffold=f.scaffold,
        second_moment=f.second_moment,
        first=f.first_moment,
    )
    spec = RoundSpec(
        algorithms.make(algorithm, training, config.num_clients, settings),
        aggregation.make(f.aggregator, f.trim_share, f.byzantine),
        f.average == "product",
        compression=compression.make(f.compression, f.topk_share),
        clip_norm=f.clip_norm,
        noise_multiplier=f.noise_multiplier,
        cohort=config.clients_per_round,
        normalize_steps=f.stragglers > 0,
        ragged_ranks=bool(f.client_ranks),
    )
    return make_round(spec, mesh, parallel)


def learning_rates(config) -> LearningRates:
    """Returns the clients' learning rates as the config sets them."""
    return LearningRates(
        start=config.learning_rate,
        end=config.min_learning_rate,
        rounds=config.rounds,
        local_steps=config.local_steps,
        warmup_rounds=config.warmup_rounds,
        decay=config.schedule,
        step_decay=config.step_schedule,
    )


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
        count=config.clients_per_round,
        local_steps=config.local_steps,
        sampling=f.sampling,
        weighting=weighting,
        dropout=f.dropout,
        stragglers=f.stragglers,
    )


def local_batches(config, data, seed: int, t: int, ids, steps) -> RoundBatches:
    """What clients `ids` train on in round `t`; `data` holds their encoded examples by id."""
    return RoundBatches(
        data,
        seed,
        t,
        ids=ids,
        steps=steps,
        local_steps=config.local_steps,
        batch_size=config.batch_size,
        seq=config.seq_len,
        accumulation=config.accumulation,
        how="openfedllm" if config.federated.sampling == "openfedllm" else "shuffle",
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
    batches = local_batches(config, data, seed, t=t, ids=cohort.ids, steps=cohort.steps)
    useful = 0

    def packed(start, stop):
        nonlocal useful
        batch = batches.chunk(start, stop)
        useful += int((batch.segment_ids > 0).sum())
        return batch

    state, report = step(
        config, programs, state, base=base, packed=packed, cohort=cohort, seed=seed, t=t
    )
    return state, figures(config, cohort, report, useful=useful, seed=seed, t=t)


def step(
    config, programs: Programs, state: FederatedState, base, packed, cohort, seed: int, t: int
) -> tuple[FederatedState, RoundReport]:
    """Training and the server's step, of a cohort whose batches `packed(start, stop)` gives."""
    who = roles(config, seed)
    update_scales = np.where(np.isin(cohort.ids, who.malicious), config.attack.boost, 1.0)
    devices = programs.mesh.shape[CLIENTS]
    return simulation.run_round(
        programs,
        state,
        base,
        batches=packed,
        cohort=cohort,
        rates=step_rates(learning_rates(config), t),
        key=jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), t), 9),
        chunk=simulation.chunk_size(config.clients_per_round, devices, config.chunk_clients),
        update_scales=update_scales.astype(np.float32),
        ranks=who.ranks[cohort.ids],
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
            noise_multiplier=f.noise_multiplier,
            delta=f.delta,
            sampling=f.sampling,
        )
    return row
