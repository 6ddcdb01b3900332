"""One run: for each seed, algorithm and arm, the paper's round loop, then its evaluation.

Read `run` first, then `ArmRun.train` and `ArmRun._round`: filtered local training, aggregation,
Constitutional AI on the aggregated model, evaluation.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from fedsafe_jax import own_folder, random_streams
from fedsafe_jax.federated import simulation
from fedsafe_jax.federated.round_programs import Programs
from fedsafe_jax.federated.simulation import FederatedState
from fedsafe_jax.inference.language_model import LanguageModel
from fedsafe_jax.models import lora
from fedsafe_jax.models.adapter_hash import adapter_hash
from fedsafe_jax.models.decoder import Decoder
from fedsafe_jax.models.sharding import fetch
from fedsafe_jax.pipeline import (
    clients,
    constitutional,
    evaluation,
    export,
    replay,
    results,
    round_setup,
    rounds,
    safe_lora_step,
)
from fedsafe_jax.pipeline.arms import PlannedArm, planned_arms, total_rounds
from fedsafe_jax.pipeline.attribution import Attribution
from fedsafe_jax.pipeline.clients import Clients
from fedsafe_jax.pipeline.federation import SIMULATED, Federation, learned_from
from fedsafe_jax.pipeline.inputs import RunInputs, load_inputs
from fedsafe_jax.pipeline.ledger_lines import ArmLines
from fedsafe_jax.pipeline.own_answers import OwnAnswers
from fedsafe_jax.pipeline.workdir import HASH, ArmFiles, claim, was_begun
from fedsafe_jax.random_streams import Purpose
from fedsafe_jax.runtime import (
    arm_secret,
    checkpoint,
    multihost,
    preemption,
    run_date,
    run_files,
)
from fedsafe_jax.runtime.owner import Owner, owned
from fedsafe_jax.runtime.progress import PhaseTimer, Progress
from fedsafe_jax.validation import validate


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
    multihost.first(lambda: own_folder.claim_workdir(folder))
    config = config.copy_and_resolve_references()
    config.date = run_date.date_of(folder, config.date, config.federated.replay)
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
    begun = was_begun(config, workdir, progress)
    if config.federated.replay and not begun:
        multihost.first(lambda: replay.check(config))
    inputs = inputs or load_inputs(config)
    if begun:
        progress.note(f"continuing the run in {workdir}")
    else:
        claim(config, workdir)
    if private := rounds.privacy_of(config):
        progress.note(private["statement"])
    outcomes: dict[str, list[dict]] = {}
    final_factors: dict[str, Any] = {}
    filter_quality: list[dict] = []
    holdings: list[clients.Holdings] = []
    own = OwnAnswers(config, inputs, workdir / "cai")
    for seed in config.seeds:
        members = federation.clients(config, inputs, seed, workdir, progress)
        if members.holdings is not None:
            holdings.append(members.holdings)
        for planned in planned_arms(config):
            arm_run = ArmRun(
                config=config,
                inputs=inputs,
                clients=members,
                own=own,
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
        return results.write(
            config,
            inputs,
            workdir,
            outcomes=outcomes,
            filter_quality=filter_quality,
            holdings=holdings,
            progress=progress,
            started=started,
        )

    summary = multihost.first(report) or {}
    # Last, as the largest files: where the disk is full, table and report are there.
    exported = export.export_arm(config, inputs, workdir, factors=final_factors, results=summary)
    if multihost.is_primary() and not exported:
        progress.note(f"nothing is exported: export_arm='{config.export_arm}' was not trained")
    return summary


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmRun:
    """One arm of one seed, from its first round (or its newest checkpoint) to its evaluation.

    Attributes:
      config, inputs, federation, workdir, owner, progress: those of the run.
      clients: clients of the seed.
      own: the base's own answers to harmless requests.
      seed: seed of this arm.
      planned: the arm and its algorithm.
      draw_secret: see `run`.
    """

    config: ConfigDict
    inputs: RunInputs
    clients: Clients
    own: OwnAnswers
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
        return arm_secret.of_arm(self._files.checkpoints, self.draw_secret)

    @functools.cached_property
    def attribution(self) -> Attribution | None:
        """What measures the harm of each client's update; None without `federated.attribution`."""
        if not self.config.federated.attribution or not self.planned.arm.federated:
            return None
        counts = self.clients.counts if self.planned.arm.filter else None
        return Attribution(self.config, self.inputs, counts)

    @functools.cached_property
    def programs(self) -> Programs:
        """The jitted programs of a round, built when they are first needed."""
        lora_config = self.inputs.lora
        model = Decoder(self.inputs.lm.config, lora_config.scale, lora_config.dropout)
        algorithm = self.planned.algorithm or round_setup.WITHOUT_CLIENTS
        config = round_setup.arm_config(self.config, self.planned.arm)
        return round_setup.build(config, algorithm, model, self.inputs.mesh)

    def run(self) -> tuple[dict, Any]:
        """Trains and evaluates, or reads what an earlier process finished.

        Returns:
          `(outcomes by task, final LoRA factors)`; the factors are None without training, and of
          an arm that was finished before and is not exported.
        """
        # The file is the first process's; the others need not see it. Without a whole one the arm
        # is evaluated again, from its newest checkpoint.
        outcome = multihost.first(lambda: self._files.read_outcome(self._check_outcome))
        if multihost.broadcast_bool(outcome is not None):
            self.progress.resumed(self.config.rounds if self.planned.arm.trains else 0)
            return outcome or {}, self._final_factors(outcome)
        factors = self.train()
        outcome = self.evaluate(factors)
        rounds_done = self.config.rounds if self.planned.arm.trains else 0
        multihost.first(lambda: self._lines.add_outcome(rounds_done, outcome))
        self._files.write_outcome(outcome)
        return outcome, factors

    def train(self) -> Any:
        """Runs all rounds; returns the final LoRA factors, None without training.

        Raises:
          Preempted: told to end; the last finished round is saved.
        """
        if not self.planned.arm.trains:
            return None
        self.progress.note(f"{self.planned.id} seed {self.seed}: training")
        config, stage = self.config, self._constitutional_stage()
        saved = checkpoint.RoundCheckpoints(self._files.checkpoints, config.checkpoint_keep)
        state, done = self._restored(saved)
        if config.federated.replay and not done:
            state, done = self._taken_over(saved, state)
        _ = self.secret  # drawn before there is a checkpoint that needs it
        self._files.updates.keep(saved.rounds())
        self._lines.go_on(done, self._hash(state))
        self.progress.resumed(done)
        try:
            for t in range(done, config.rounds):
                new, row, cai_records = self._round(state, stage, t)
                adapter, held = self._hash(new), learned_from(config, self.planned.arm, row)
                cai_rows = self._files.record_rows(t, cai_records)
                if self.owner is not None:
                    self.owner.check()
                with preemption.hold():
                    # Recorded before saved: a kill in between repeats the round, and replaces its
                    # lines, instead of losing them.
                    row = self._lines.add_round(row, cai_rows, held, adapter)
                    self._files.record(row, cai_rows)
                    self.progress.round_done(row)
                    state, done = new, t + 1
                    if self._is_checkpoint(done):
                        saved.save(done, state)
                        self._files.updates.keep(saved.rounds())
                preemption.reached(self.progress.rounds_done)
        except preemption.Preempted:
            with preemption.hold():
                if done:
                    saved.save(done, state)
                saved.close()
            raise
        saved.close()
        return self._evaluated(state)

    def _evaluated(self, state: FederatedState) -> Any:
        """Returns the factors of `round_setup.evaluated`, on the mesh."""
        factors = round_setup.evaluated(self.config, self.planned.algorithm, state)
        here = factors is state.server.factors
        return factors if here else simulation.replicate(factors, self.inputs.mesh)

    def _round(self, state: FederatedState, stage, t: int) -> tuple[FederatedState, dict, list]:
        """Returns the state after round `t`, its row of metrics, and its records of CAI."""
        config, timer = self.config, PhaseTimer()
        multihost.barrier("round")
        row = {"arm": self.planned.id, "seed": self.seed, "round": t}
        if self.planned.arm.federated or self.planned.arm.baseline:
            # Filtered local training and aggregation.
            before = state.server
            state, figures = self.federation.train(self, state, self.clients, t)
            timer.mark("federated")
            row |= figures
            row["tokens_per_second"] = row["useful_tokens"] / timer.seconds["federated"]
            where = f"{self.planned.id} seed {self.seed} round {t + 1}"
            for what in rounds.left_out(row):
                self.progress.warn(f"{where}: {what}")
            if self.attribution is not None:
                row["attribution"] = self.attribution.measure(before)
                timer.mark("attribution")
        else:
            row |= rounds.NO_CLIENTS
        if self.planned.arm.federated and config.federated.unaligned and t == config.rounds - 1:
            # Once, behind the last aggregation, see `safe_lora`.
            adapter, row["safe_lora"] = safe_lora_step.run(config, fetch(state.server.adapter))
            state = self._with_adapter(state, adapter)
            timer.mark("safe_lora")
        if self.planned.arm.filter:
            ids = learned_from(config, self.planned.arm, row)
            row["filter"] = self.clients.filtered_of(ids)
        records = []
        if stage is not None:
            # Constitutional AI on the aggregated model.
            current, base = map(self._language_model, (state.server.adapter, None))
            factors, row["cai"], records = stage.run(current, base, t, timer)
            state = self._with_adapter(state, fetch(factors))
        if count := config.eval.every_round_prompts:
            lm = self._language_model(self._evaluated(state))
            options = evaluation.options_of(config)
            row["eval"] = evaluation.probe(lm, self.inputs.evals, count, options)
            timer.mark("probe")
        row["seconds"] = timer.seconds
        return state, row, records

    def _with_adapter(self, state: FederatedState, factors: Any) -> FederatedState:
        """Returns the state whose server has another adapter, the first process's."""
        factors = simulation.replicate(multihost.broadcast(factors), self.inputs.mesh)
        return state._replace(server=state.server.with_adapter(factors))

    def evaluate(self, factors: Any) -> dict:
        """Returns the outcomes of the finished arm for every item of every task."""
        self.progress.note(f"{self.planned.id} seed {self.seed}: evaluating")
        started = time.monotonic()
        trained = factors is not None
        own = multihost.local(factors, self.inputs.mesh) if trained else None
        hash_ = adapter_hash(own) if trained else ""
        base = self._language_model(None) if self.planned.arm.trains else None
        options = evaluation.options_of(self.config, base)
        lm, kept = self._language_model(factors), self._files.answers(hash_)
        outcome = evaluation.evaluate(lm, self.inputs.evals, options, kept)
        outcome["seconds"] = time.monotonic() - started
        if trained:
            outcome[HASH] = hash_
        return outcome

    def _check_outcome(self, outcome: dict) -> None:
        """Raises what the tasks raise where an outcome is not of theirs."""
        options = evaluation.options_of(self.config)
        evaluation.summarise(self.inputs.evals, [outcome], options)

    def update_writer(self, state: FederatedState, t: int) -> Callable | None:
        """Returns what takes the updates of round `t`: their files in a round that is kept, and
        `attribution`; None without either."""
        writer = None
        if self.config.keep_updates and self._is_checkpoint(t + 1):
            factors = state.server.factors
            start = multihost.local(state.server.adapter, self.inputs.mesh)
            writer = self._files.updates.begin_round(t + 1, start, like=factors)
        return writer if self.attribution is None else self.attribution.receiver(writer)

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
            own=self.own,
            folder=self.workdir / "cai",
            mine=self._files.is_mine,
            seed=self.seed,
        )

    @functools.cached_property
    def _lines(self) -> ArmLines:
        """The arm's lines of the ledger."""
        return ArmLines(self.config, self.clients, self._files)

    def _hash(self, state: FederatedState) -> str:
        """Returns the hash of the adapter that is evaluated after a round; in all processes."""
        return adapter_hash(multihost.local(self._evaluated(state), self.inputs.mesh))

    @property
    def _files(self) -> ArmFiles:
        return ArmFiles(self.workdir, self.planned, self.seed)

    def _restored(self, saved: checkpoint.RoundCheckpoints) -> tuple[FederatedState, int]:
        """Returns the newest state that was saved, or the first one, and the rounds done."""
        key = random_streams.key(Purpose.ADAPTER, self.seed)
        factors = lora.init(key, self.inputs.lm.config, self.inputs.lora)
        count = round_setup.arm_config(self.config, self.planned.arm).num_clients
        first = simulation.initial_state(self.programs, factors, count)
        state, done = saved.restore(first)
        server = simulation.replicate(state.server, self.inputs.mesh)
        return state._replace(server=server), done

    def _taken_over(
        self, saved: checkpoint.RoundCheckpoints, state: FederatedState
    ) -> tuple[FederatedState, int]:
        """Returns the state that a replay begins with, and its rounds, which are saved here too."""
        state, done = replay.take_over(self.config, self._files, self._lines, state)
        if done:
            server = simulation.replicate(state.server, self.inputs.mesh)
            state = state._replace(server=server)
            saved.save(done, state)
        where = f"{self.planned.id} seed {self.seed}: replayed from round {done + 1} on"
        self.progress.note(f"{where}, {done} taken from {self.config.federated.replay}")
        return state, done

    def _final_factors(self, outcome: dict | None) -> Any:
        """Returns the LoRA factors of a finished arm that is exported, None of another arm.

        Others need no checkpoint any more.

        Args:
          outcome: outcomes of the arm; None in all processes but the first.

        Raises:
          WorkdirError: the newest checkpoint is not what was evaluated.
        """
        chosen = export.exported_arm(self.config)
        if chosen is None or (chosen.id, self.config.seeds[0]) != (self.planned.id, self.seed):
            return None
        saved = checkpoint.RoundCheckpoints(self._files.checkpoints, self.config.checkpoint_keep)
        state, done = self._restored(saved)
        saved.close()
        factors = self._evaluated(state)
        here = adapter_hash(multihost.local(factors, self.inputs.mesh))
        multihost.first(
            lambda: self._files.check_hash(outcome, done, self.config.rounds, here=here)
        )
        return factors

    def _language_model(self, factors) -> LanguageModel:
        """Returns the base model of this process, under the factors where there are some."""
        if factors is None:
            return self.inputs.lm
        own = multihost.local(factors, self.inputs.mesh)
        return self.inputs.lm.with_adapter(lora.Adapter(own, lora.config_of(own, self.inputs.lora)))
