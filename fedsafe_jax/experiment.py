"""One run: for each seed, algorithm and arm, the paper's round loop, then its evaluation.

Read `run` first, then `ArmRun.train` and `ArmRun._round`: filtered local training, aggregation,
Constitutional AI on the aggregated model, evaluation.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from fedsafe_jax import random_streams, whole_files
from fedsafe_jax.cai.revise import to_row
from fedsafe_jax.evals import comparison
from fedsafe_jax.federated import simulation
from fedsafe_jax.federated.mesh import spans_hosts
from fedsafe_jax.federated.round_programs import Programs
from fedsafe_jax.federated.simulation import FederatedState
from fedsafe_jax.filters.actions import FilterCounts
from fedsafe_jax.inference.language_model import LanguageModel
from fedsafe_jax.models import lora
from fedsafe_jax.models.decoder import Decoder
from fedsafe_jax.models.sharding import fetch
from fedsafe_jax.pipeline import clients, constitutional, evaluation, export, filtering, rounds
from fedsafe_jax.pipeline.arms import PlannedArm, any_filter, planned_arms, references, total_rounds
from fedsafe_jax.pipeline.clients import Clients
from fedsafe_jax.pipeline.inputs import RunInputs, load_inputs
from fedsafe_jax.pipeline.read_files import files_of
from fedsafe_jax.random_streams import Purpose
from fedsafe_jax.report import page
from fedsafe_jax.report.table import print_table
from fedsafe_jax.runtime import (
    arm_secret,
    checkpoint,
    fingerprints,
    multihost,
    preemption,
    run_date,
    run_files,
)
from fedsafe_jax.runtime.client_updates import ClientUpdates
from fedsafe_jax.runtime.libraries import versions
from fedsafe_jax.runtime.owner import Owner, owned
from fedsafe_jax.runtime.progress import PhaseTimer, Progress
from fedsafe_jax.validation import validate


class Federation(NamedTuple):
    """Where the clients are and train: simulated here, or at real sites.

    Attributes:
      clients: `(config, inputs, seed, workdir, progress) -> Clients`.
      train: `(arm_run, state, clients, t) -> (state, figures)`: local training of round `t`, from
        0, and the server's step.
    """

    clients: Callable[..., Clients]
    train: Callable[..., tuple[FederatedState, dict]]


def simulated_clients(
    config: ConfigDict, inputs: RunInputs, seed: int, workdir: epath.Path, progress: Progress
) -> Clients:
    """Builds the simulated clients of a seed, filtered where an arm asks for it."""
    built = clients.build(config, inputs, seed, progress)
    if any_filter(config):
        built = filtering.filter_clients(
            config, inputs, built, seed=seed, workdir=workdir, progress=progress
        )
    return built


def train_simulated(
    arm_run: "ArmRun", state: FederatedState, members: Clients, t: int
) -> tuple[FederatedState, dict]:
    """Trains simulated clients on this machine's devices, see `rounds.run`."""
    return rounds.run(
        arm_run.config,
        arm_run.planned.algorithm,
        arm_run.programs,
        state=state,
        base=arm_run.inputs.base,
        data=members.filtered if arm_run.planned.arm.filter else members.plain,
        seed=arm_run.seed,
        t=t,
        secret=arm_run.secret,
        keep_update=arm_run.update_writer(state, t),
    )


NOT_EXPORTED = "nothing whole was exported, and the same command does it again"
SIMULATED = Federation(simulated_clients, train_simulated)


def run(
    config: ConfigDict,
    workdir: str,
    inputs: RunInputs | None = None,
    federation: Federation = SIMULATED,
    draw_secret: Callable[[], int] = arm_secret.draw,
) -> dict:
    """Runs or resumes everything the config asks for.

    Args:
      config: config of the run.
      workdir: folder of everything the run writes.
      inputs: what the run reads; None to read it.
      federation: where clients train.
      draw_secret: draws what the noise of an arm comes from, see `runtime.arm_secret`; only a test
        gives another than the operating system's entropy.

    Returns:
      What `results.json` holds; {} in all processes but the first.

    Raises:
      WorkdirError: the workdir holds another run, is in use, or began with other files.
      StorageError: the storage does not take or give a file; the same command continues later.
      ConfigError, and what `load_inputs` raises: naming what is wrong.
    """
    validate(config)
    folder = epath.Path(workdir)
    config = config.copy_and_resolve_references()
    config.date = run_date.date_of(folder, config.date)
    # Before the model loads: whether the folder can be written to, and no other run does.
    multihost.first(lambda: run_files.check_config(folder, config.to_dict()))
    with owned(folder) as owner:
        return _run(
            config, folder, inputs, federation=federation, owner=owner, draw_secret=draw_secret
        )


def _run(
    config: ConfigDict,
    workdir: epath.Path,
    inputs: RunInputs | None,
    federation: Federation,
    owner: Owner | None,
    draw_secret: Callable[[], int],
) -> dict:
    """Does what `run` says in a workdir that is this run's, `owner` being None in other hosts."""
    started = time.monotonic()
    progress = Progress(total_rounds(config))
    begun = multihost.first(lambda: run_files.check_config(workdir, config.to_dict()))
    if begun:
        multihost.first(lambda: _check_files(config, workdir, progress))
    inputs = inputs or load_inputs(config)
    if begun:
        progress.note(f"continuing the run in {workdir}")
    else:
        # Where reading fails, nothing is claimed: the config may be put right in the same workdir.
        multihost.first(lambda: fingerprints.check(workdir, files_of(config)))
        multihost.first(lambda: run_files.claim_workdir(workdir, config.to_dict()))
    if private := rounds.privacy_of(config):
        progress.note(private["statement"])
    outcomes: dict[str, list[dict]] = {}
    final_factors: dict[str, Any] = {}
    filter_quality: list[dict] = []
    holdings: list[clients.Holdings] = []
    for seed in config.seeds:
        members = federation.clients(config, inputs, seed, workdir, progress)
        if members.holdings is not None:
            holdings.append(members.holdings)
        for planned in planned_arms(config):
            arm_run = ArmRun(
                config=config,
                inputs=inputs,
                clients=members,
                federation=federation,
                workdir=workdir,
                owner=owner,
                progress=progress,
                seed=seed,
                planned=planned,
                draw_secret=draw_secret,
            )
            outcome, factors = arm_run.run()
            outcomes.setdefault(planned.id, []).append(outcome)
            final_factors.setdefault(planned.id, factors)
        if members.quality is not None:
            filter_quality.append(members.filter_record())

    def report() -> dict:
        results = summarise(config, inputs, outcomes, filter_quality, holdings=holdings)
        results["seconds"] = {"this_process": time.monotonic() - started}
        run_files.write_json(workdir / "results.json", results)
        page.write(workdir, config.to_dict(), results, outcomes=outcomes, sets=inputs.evals)
        progress.end()
        print_table(results, inputs.evals)
        return results

    results = multihost.first(report) or {}
    # Last, as the largest files: where the disk is full, table and report are there.
    exported = _exported(config, inputs, workdir, factors=final_factors, results=results)
    if multihost.is_primary() and not exported:
        progress.note(f"nothing is exported: export_arm='{config.export_arm}' was not trained")
    return results


def _check_files(config: ConfigDict, workdir: epath.Path, progress: Progress) -> None:
    """Checks that what was read at the first start is still the same."""
    if fingerprints.check(workdir, files_of(config)) == "written":
        progress.note(f"{workdir / fingerprints.NAME} was not there: the files read are as of now")


def _exported(
    config: ConfigDict, inputs: RunInputs, workdir: epath.Path, factors: dict, results: dict
) -> bool | None:
    """Exports the arm that the config names, see `export.export_arm`; all processes call this."""

    def export_arm() -> bool:
        with whole_files.storage(workdir / "export", NOT_EXPORTED):
            return export.export_arm(config, inputs, workdir, factors=factors, results=results)

    multihost.barrier("export")
    if spans_hosts(inputs.mesh):  # no process has the whole base: all fetch it together
        exported = export_arm()
        multihost.barrier("reported")
        return exported
    return multihost.first(export_arm)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmRun:
    """One arm of one seed, from its first round (or its newest checkpoint) to its evaluation.

    Attributes:
      config, inputs, federation, workdir, owner, progress: those of the run.
      clients: clients of the seed.
      seed: seed of this arm.
      planned: the arm and its algorithm.
      draw_secret: see `run`.
    """

    config: ConfigDict
    inputs: RunInputs
    clients: Clients
    federation: Federation
    workdir: epath.Path
    owner: Owner | None
    progress: Progress
    seed: int
    planned: PlannedArm
    draw_secret: Callable[[], int] = arm_secret.draw

    @functools.cached_property
    def secret(self) -> int | None:
        """What noise and cohorts of differential privacy are drawn from; None without it."""
        if not self.config.federated.noise_multiplier:
            return None
        return arm_secret.of_arm(self._checkpoints, self.draw_secret)

    @functools.cached_property
    def programs(self) -> Programs:
        """The jitted programs of a round, built when they are first needed."""
        lora_config = self.inputs.lora
        model = Decoder(self.inputs.lm.config, lora_config.scale, lora_config.dropout)
        return rounds.build(self.config, self.planned.algorithm, model, self.inputs.mesh)

    def run(self) -> tuple[dict, Any]:
        """Trains and evaluates, or reads what an earlier process finished.

        Returns:
          `(outcomes by task, final LoRA factors)`; the factors are None without training.
        """
        path = self.workdir / "arms" / f"{self.planned.folder}_seed{self.seed}.json"
        # The file is the first process's; the others need not see it. Without a whole one the arm
        # is evaluated again, from its newest checkpoint.
        outcome = multihost.first(lambda: self._outcome(path))
        if multihost.broadcast_bool(outcome is not None):
            self.progress.resumed(self.config.rounds if self.planned.arm.trains else 0)
            return outcome or {}, self._final_factors()
        factors = self.train()
        outcome = self.evaluate(factors)
        run_files.write_json(path, outcome)
        return outcome, factors

    def _outcome(self, path: epath.Path) -> dict | None:
        """Returns the outcomes of an arm that is done, or None."""
        outcome = whole_files.read_json(path)
        if outcome is not None and not isinstance(outcome, dict):
            whole_files.set_aside(path, "it holds no outcomes")
            return None
        return outcome

    def train(self) -> Any:
        """Runs all rounds; returns the final LoRA factors, None without training.

        Raises:
          Preempted: told to end; the last finished round is saved.
        """
        if not self.planned.arm.trains:
            return None
        config, stage = self.config, self._constitutional_stage()
        saved = checkpoint.RoundCheckpoints(self._checkpoints, config.checkpoint_keep)
        state, done = self._restored(saved)
        _ = self.secret  # drawn before there is a checkpoint that needs it
        self._updates.keep(saved.rounds())
        self.progress.resumed(done)
        try:
            for t in range(done, config.rounds):
                new, row, cai_records = self._round(state, stage, t)
                if self.owner is not None:
                    self.owner.check()
                with preemption.hold():
                    # Recorded before saved: a kill in between repeats the round, and replaces its
                    # lines, instead of losing them.
                    self._record(row, cai_records)
                    state, done = new, t + 1
                    if self._is_checkpoint(done):
                        saved.save(done, state)
                        self._updates.keep(saved.rounds())
                preemption.reached(self.progress.rounds_done)
        except preemption.Preempted:
            with preemption.hold():
                if done:
                    saved.save(done, state)
                saved.close()
            raise
        saved.close()
        return state.server.factors

    def _round(self, state: FederatedState, stage, t: int) -> tuple[FederatedState, dict, list]:
        """Returns the state after round `t`, its row of metrics, and its records of CAI."""
        config, timer = self.config, PhaseTimer()
        multihost.barrier("round")
        # Filtered local training and aggregation.
        state, figures = self.federation.train(self, state, self.clients, t)
        timer.mark("federated")
        row = {"arm": self.planned.id, "seed": self.seed, "round": t} | figures
        row["tokens_per_second"] = row["useful_tokens"] / timer.seconds["federated"]
        self._warn(row)
        if self.planned.arm.filter:
            counts = [self.clients.counts[i] for i in row["clients"] + row["no_data"]]
            row["filter"] = {k: sum(getattr(c, k) for c in counts) for k in FilterCounts._fields}
        records = []
        if stage is not None:
            # Constitutional AI on the aggregated model.
            current, base = map(self._language_model, (state.server.factors, None))
            factors, row["cai"], records = stage.run(current, base, t, timer)
            factors = multihost.broadcast(fetch(factors))
            factors = simulation.replicate(factors, self.inputs.mesh)
            state = state._replace(server=state.server._replace(factors=factors))
        if count := config.eval.every_round_prompts:
            lm = self._language_model(state.server.factors)
            options = evaluation.options_of(config)
            row["eval"] = evaluation.probe(lm, self.inputs.evals, count, options)
            timer.mark("probe")
        row["seconds"] = timer.seconds
        return state, row, records

    def evaluate(self, factors: Any) -> dict:
        """Returns the outcomes of the finished arm for every item of every task."""
        self.progress.note(f"{self.planned.id} seed {self.seed}: evaluating")
        started = time.monotonic()
        # Only the first process asks the endpoint, and the base is not compared with itself.
        endpoint = evaluation.endpoint_of(self.config)
        if endpoint and spans_hosts(self.inputs.mesh):
            endpoint = evaluation.asked_by_first(endpoint)
        elif not multihost.is_primary():
            endpoint = None
        base = self._language_model(None) if self.planned.arm.trains else None
        options = evaluation.options_of(self.config, endpoint, base)
        outcome = evaluation.evaluate(self._language_model(factors), self.inputs.evals, options)
        outcome["seconds"] = time.monotonic() - started
        return outcome

    def update_writer(self, state: FederatedState, t: int) -> Callable | None:
        """Returns what writes the updates of round `t`; None for a round that is not kept."""
        if not self.config.keep_updates or not self._is_checkpoint(t + 1):
            return None
        factors, updates = state.server.factors, self._updates
        updates.write_start(t + 1, multihost.local(factors, self.inputs.mesh))

        def write(client: int, update: np.ndarray) -> None:
            updates.write(t + 1, client, update, like=factors)

        return write

    def _is_checkpoint(self, done: int) -> bool:
        return done % self.config.checkpoint_every == 0 or done == self.config.rounds

    def _constitutional_stage(self):
        if not self.planned.arm.cai:
            return None
        return constitutional.ConstitutionalStage(
            config=self.config,
            inputs=self.inputs,
            model=Decoder(self.inputs.lm.config, self.inputs.lora.scale),
            clients=self.clients,
            folder=self.workdir / "cai",
            mine=self._is_mine,
            seed=self.seed,
        )

    @property
    def _checkpoints(self) -> epath.Path:
        return run_files.arm_folder(self.workdir, "checkpoints", self.planned.folder, self.seed)

    @property
    def _updates(self) -> ClientUpdates:
        folder = run_files.arm_folder(self.workdir, "updates", self.planned.folder, self.seed)
        return ClientUpdates(folder)

    def _restored(self, saved: checkpoint.RoundCheckpoints) -> tuple[FederatedState, int]:
        """Returns the newest state that was saved, or the first one, and the rounds done."""
        key = random_streams.key(Purpose.ADAPTER, self.seed)
        factors = lora.init(key, self.inputs.lm.config, self.inputs.lora)
        first = simulation.initial_state(self.programs, factors, self.config.num_clients)
        state, done = saved.restore(first)
        server = simulation.replicate(state.server, self.inputs.mesh)
        return state._replace(server=server), done

    def _final_factors(self):
        """Returns the LoRA factors of a finished arm, from its newest checkpoint."""
        if not self.planned.arm.trains:
            return None
        saved = checkpoint.RoundCheckpoints(self._checkpoints, self.config.checkpoint_keep)
        state, _ = self._restored(saved)
        saved.close()
        return state.server.factors

    def _language_model(self, factors) -> LanguageModel:
        """Returns the base model of this process, under the factors where there are some."""
        if factors is None:
            return self.inputs.lm
        own = multihost.local(factors, self.inputs.mesh)
        return self.inputs.lm.with_adapter(lora.Adapter(own, self.inputs.lora))

    def _warn(self, row: dict) -> None:
        """Says loudly what a round left out."""
        where = f"{self.planned.id} seed {self.seed} round {row['round'] + 1}"
        if row["excluded"]:
            names = ", ".join(map(str, row["excluded"]))
            self.progress.warn(f"{where}: update not finite, left out: client(s) {names}")
        if row["skipped"]:
            self.progress.warn(f"{where}: SKIPPED, no client was left; the model stays as it was")

    def _record(self, row: dict, cai_records: list) -> None:
        """Writes a round's row of metrics and records of CAI in place of older ones."""
        t = row["round"]
        if cai_records:
            key = {"arm": self.planned.id, "seed": self.seed, "round": t}
            run_files.replace_lines(
                self.workdir / "cai" / f"round_{t:03d}.jsonl",
                self._is_mine,
                [key | to_row(r) for r in cai_records],
            )
        run_files.replace_lines(
            self.workdir / "metrics.jsonl",
            lambda old: self._is_mine(old) and old["round"] >= t,
            [row],
        )
        self.progress.round_done(row)

    def _is_mine(self, row: dict) -> bool:
        return row["arm"] == self.planned.id and row["seed"] == self.seed


def held(holdings: list[clients.Holdings]) -> dict:
    """Returns what `results.json` says of the clients' pairs, a value a seed.

    Before any filter; the shares are null of those without pairs, and nothing is said of real
    sites, whose labels are not known.
    """
    if not holdings:
        return {}
    return {
        "pairs_held": [sum(h.pairs) for h in holdings],
        "pairs_by_client": [list(h.pairs) for h in holdings],
        "harmful_share_held": [h.harmful_share for h in holdings],
        "harmful_share_by_client": [h.by_client for h in holdings],
        "pairs_lost": [h.lost for h in holdings],
        "notes": [h.notes for h in holdings],
    }


def summarise(
    config: ConfigDict,
    inputs: RunInputs,
    outcomes: dict,
    filter_quality: list[dict],
    holdings: list[clients.Holdings],
) -> dict:
    """Returns the content of `results.json`."""
    options = evaluation.options_of(config)
    arms = {
        planned.id: {"algorithm": planned.algorithm}
        | evaluation.summarise(inputs.evals, outcomes[planned.id], options)
        for planned in planned_arms(config)
    }
    differences = comparison.differences(inputs.evals, outcomes, references(config), options)
    asked = {name: one for name, one in inputs.evals.items() if one.task.generates}
    task_versions = {name: one.task.version for name, one in inputs.evals.items()}
    results = {
        "arms": arms,
        "differences": differences,
        "seeds": list(config.seeds),
        "data": inputs.counts | held(holdings),
        "sources": {name: one.source for name, one in asked.items()},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": versions() | {"tasks": task_versions},
    }
    if private := rounds.privacy_of(config):
        results["privacy"] = private
    if filter_quality:
        names = ("accuracy", "precision", "recall", "hmean", "auroc")
        mean = {n: _mean_of_defined([q[n] for q in filter_quality]) for n in names}
        results["filter"] = mean | {"per_seed": filter_quality}
    return results


def _mean_of_defined(values: list[float | None]) -> float | None:
    """Returns the mean of the seeds in which a rate is defined, None where it is in none."""
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None
