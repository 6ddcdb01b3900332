"""Federated rounds of a run, from its config: cohorts, batches, a round's figures, its privacy."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from fedsafe_jax import random_streams
from fedsafe_jax.data.batches import RoundBatches
from fedsafe_jax.data.chat import Encoded
from fedsafe_jax.data.packing import Batch
from fedsafe_jax.federated import (
    participation,
    privacy,
    simulation,
)
from fedsafe_jax.federated.attackers import ATTACKERS
from fedsafe_jax.federated.participation import SAMPLINGS, Cohort
from fedsafe_jax.federated.round_programs import Programs
from fedsafe_jax.federated.schedules import LearningRates, step_rates
from fedsafe_jax.federated.simulation import FederatedState, RoundReport
from fedsafe_jax.pipeline import round_setup
from fedsafe_jax.pipeline.arms import planned_arms
from fedsafe_jax.pipeline.clients import learned, roles
from fedsafe_jax.random_streams import Purpose
from fedsafe_jax.runtime import multihost

# What every line of `metrics.jsonl` has, of a round without clients.
NO_CLIENTS = {"loss": None, "update_norm": None, "tokens_per_second": None}


def learning_rates(config: ConfigDict) -> LearningRates:
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


def draw_cohort(
    config: ConfigDict,
    algorithm: str,
    sizes: Sequence[float],
    seed: int,
    t: int,
    secret: int | None = None,
) -> Cohort:
    """Draws the clients of round `t`, with their weights and steps.

    Args:
      config: config of the run.
      algorithm: a name in `algorithms.ALGORITHMS`.
      sizes: what every client learns from, see `clients.learned`.
      seed, t: seed of the run and number of the round, from 0; the draw depends on nothing else.
      secret: under differential privacy the arm's secret, which then takes the seed's place:
        epsilon counts on nobody knowing who is in a cohort.
    """
    f = config.federated
    return participation.draw_cohort(
        seed if secret is None else secret,
        t,
        sizes,
        count=config.clients_per_round,
        local_steps=config.local_steps,
        sampling=f.sampling,
        weighting=round_setup.weighting_of(config, algorithm),
        dropout=f.dropout,
        stragglers=f.stragglers,
        groups=f.noise_bands,
        exclude=f.exclude,
    )


def local_batches(
    config: ConfigDict,
    data: Sequence[Sequence[Encoded]] | Mapping[int, Sequence[Encoded]],
    seed: int,
    t: int,
    ids: Sequence[int] | np.ndarray,
    steps: Sequence[int] | np.ndarray,
) -> RoundBatches:
    """Draws the batches that clients train on in round `t`.

    Args:
      config: config of the run.
      data: encoded examples by client.
      seed, t: seed of the run and number of the round, from 0.
      ids: clients of the round.
      steps: local steps that each of them gets done.
    """
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
        order=SAMPLINGS[config.federated.sampling].example_order,
        noise=bool(config.lora_dropout),
    )


def run(
    config: ConfigDict,
    algorithm: str,
    programs: Programs,
    state: FederatedState,
    base: Any,
    data: Sequence[Sequence[Encoded]],
    seed: int,
    t: int,
    secret: int | None = None,
    keep_update: Callable[[int, np.ndarray], None] | None = None,
) -> tuple[FederatedState, dict]:
    """Runs one round.

    Args:
      config: config of the run.
      algorithm, programs: name of the algorithm, and its programs from `build`.
      state: state before the round.
      base: frozen base parameters.
      data: encoded examples of every client.
      seed, t: seed of the run and number of the round, from 0; what is drawn depends on these and
        the secret alone.
      secret: see `step`.
      keep_update: takes each client's update, see `simulation.run_round`.

    Returns:
      The state after the round, and its figures, a line of `metrics.jsonl`.
    """
    sizes = list(map(learned, data))
    cohort = draw_cohort(config, algorithm, sizes, seed=seed, t=t, secret=secret)
    batches = local_batches(config, data, seed, t=t, ids=cohort.ids, steps=cohort.steps)
    useful = 0

    def packed(start, stop):
        nonlocal useful
        batch = batches.chunk(start, stop)
        useful += int((batch.segment_ids > 0).sum())
        return batch

    state, report = step(
        config,
        programs,
        state,
        base=base,
        packed=packed,
        rows=batches.filled,
        cohort=cohort,
        seed=seed,
        t=t,
        secret=secret,
        keep_update=keep_update,
    )
    return state, figures(config, cohort, report, useful=useful, seed=seed, t=t)


def step(
    config: ConfigDict,
    programs: Programs,
    state: FederatedState,
    base: Any,
    packed: Callable[[int, int], Batch],
    cohort: Cohort,
    seed: int,
    t: int,
    secret: int | None = None,
    keep_update: Callable[[int, np.ndarray], None] | None = None,
    rows: np.ndarray | None = None,
) -> tuple[FederatedState, RoundReport]:
    """Trains a cohort and makes the server's step.

    Args:
      config: config of the run.
      programs: programs from `build`.
      state: state before the round.
      base: frozen base parameters.
      packed: `(start, stop) -> Batch` of that part of the cohort, see `simulation.run_round`.
      cohort: clients of the round.
      seed, t: seed of the run and number of the round, from 0.
      secret: secret of the arm, from which its noise is drawn; None without differential privacy.
      keep_update: takes each client's update, see `simulation.run_round`.
      rows: filled rows of each client's batches, likewise.
    """
    who, row = roles(config, seed), None
    malicious = np.isin(cohort.ids, who.malicious)
    factor = ATTACKERS[config.attack.kind].factor(config.attack.boost)
    if secret is None:
        key = random_streams.key(Purpose.FRESH_SLOTS, seed, t)
    elif config.federated.noise_bands == 1:
        key = random_streams.key(Purpose.NOISE, secret, t)
    else:
        key = random_streams.key(Purpose.NOISE, secret)
        # What an optimiser finds may differ in its last bits from host to host.
        row = privacy.noising_row(config.rounds, config.federated.noise_bands, t)
        row = multihost.broadcast(row)
    return simulation.run_round(
        programs,
        state,
        base,
        batches=packed,
        cohort=cohort,
        rates=step_rates(learning_rates(config), t),
        chunk=simulation.chunk_size(config.clients_per_round, programs.mesh, config.chunk_clients),
        update_scales=np.where(malicious, factor, 1.0).astype(np.float32),
        key=key,
        noising_row=row,
        ranks=who.ranks[cohort.ids],
        malicious=malicious,
        keep_update=keep_update,
        rows=rows,
    )


def figures(
    config: ConfigDict, cohort: Cohort, report: RoundReport, useful: int, seed: int, t: int
) -> dict:
    """Returns the figures of a round as one row of `metrics.jsonl`.

    Args:
      config: config of the run.
      cohort, report: clients of the round, and what it did.
      useful: tokens of its batches, padding not counted.
      seed, t: seed of the run and number of the round, from 0.
    """
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
    if report.skipped:
        row["skipped_because"] = report.skipped_because
    # JSON has no NaN, so figures that are not finite become null.
    row = {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in row.items()}
    if f.dropout:
        row["dropped_out"] = list(cohort.dropped_out)
    if f.exclude:
        row["unlearned"] = list(cohort.unlearned)
    if f.stragglers:
        row["steps"] = cohort.steps.tolist()
    if config.attack.clients:
        row["malicious"] = [i for i in cohort.ids.tolist() if i in who.malicious]
    if f.noise_multiplier:
        row["epsilon"] = _epsilon(config, t + 1)
    return row


def _epsilon(config: ConfigDict, rounds: int | None = None, runs: int = 1) -> float:
    f = config.federated
    groups = -(-(rounds or config.rounds) // f.noise_bands)  # rounds of a client's group
    return privacy.epsilon(
        groups * f.noise_bands * runs,
        config.num_clients,
        config.clients_per_round,
        noise_multiplier=f.noise_multiplier,
        delta=f.delta,
        sampling=f.sampling,
        bands=f.noise_bands,
    )


def privacy_of(config: ConfigDict) -> dict:
    """Returns what a run may say of its differential privacy; {} where it has none.

    Args:
      config: config of the run.

    Returns:
      `epsilon` of each arm and seed, `runs`, their number, `epsilon_of_all` of them together,
      `delta`, and the `statement` that stands wherever epsilon does.
    """
    if not config.federated.noise_multiplier:
        return {}
    runs = len(config.seeds) * sum(planned.arm.federated for planned in planned_arms(config))
    one, together = _epsilon(config), _epsilon(config, runs=runs)
    delta = config.federated.delta
    # Each run draws its own cohorts and noise, so all of them are one run of as many rounds.
    composed = f"; the {runs} of this run together have {together:.2f}" if runs > 1 else ""
    return {
        "epsilon": one,
        "epsilon_of_all": together,
        "runs": runs,
        "delta": delta,
        "statement": f"Differential privacy of each client: epsilon {one:.2f} at delta {delta:g} "
        f"for the adapter of one arm and seed{composed}. {privacy.NOT_PRIVATE}",
    }


def left_out(row: dict) -> list[str]:
    """Says what a round left out, from its row of metrics; [] for nothing."""
    said = []
    if row["excluded"]:
        names = ", ".join(map(str, row["excluded"]))
        said.append(f"update not finite, left out: client(s) {names}")
    if row["skipped"]:
        said.append(f"SKIPPED, {row['skipped_because']}; the model stays as it was")
    return said
