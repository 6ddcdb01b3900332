"""One run: for each seed, algorithm and arm, the paper's round loop, then its evaluation."""

import functools
import json
import os
import time

import jax
import numpy as np
from etils import epath

from fedsafe_jax.data.refusals import start_refusal
from fedsafe_jax.evals import suite
from fedsafe_jax.evals.judges import ChatEndpoint
from fedsafe_jax.federated import simulation
from fedsafe_jax.filters.actions import FilterCounts
from fedsafe_jax.models import lora
from fedsafe_jax.models.decoder import Decoder
from fedsafe_jax.pipeline import clients, constitutional, export, filtering, rounds
from fedsafe_jax.pipeline.clients import Clients
from fedsafe_jax.pipeline.inputs import load_inputs
from fedsafe_jax.report import page
from fedsafe_jax.report.model_card import model_card
from fedsafe_jax.report.table import print_table
from fedsafe_jax.runtime import checkpoint, multihost, preemption, run_files
from fedsafe_jax.runtime.progress import PhaseTimer, Progress
from fedsafe_jax.validation import validate


def run(config, workdir: str, inputs=None, build=None, arm_run=None) -> dict:
    """Runs or resumes everything the config asks for.

    Args:
      config: of the run.
      workdir: of its files.
      inputs: what it reads; None to read it.
      build: `(config, inputs, seed, workdir, progress) -> Clients`.
      arm_run: `ArmRun`, or what takes its arguments and trains clients elsewhere.

    Returns:
      What `results.json` holds; {} in all processes but the first.
    """
    validate(config)
    started = time.monotonic()
    inputs = inputs or load_inputs(config)
    workdir = epath.Path(workdir)
    trained_arms = [arm for _, _, arm in arm_list(config) if arm != "base"]
    progress = Progress(len(config.seeds) * len(trained_arms) * config.rounds)
    if run_files.claim_workdir(workdir, config.to_dict()):
        progress.note(f"continuing the run in {workdir}")
    outcomes: dict[str, list[dict]] = {}
    final_adapters: dict[str, object] = {}
    filter_quality: list[dict] = []
    for seed in config.seeds:
        members = (build or build_clients)(config, inputs, seed, workdir, progress)
        for arm_id, algorithm, arm in arm_list(config):
            path = workdir / "arms" / f"{arm_id.replace('/', '_')}_seed{seed}.json"
            runner = (arm_run or ArmRun)(
                config, inputs, members, workdir, progress, seed, arm_id, algorithm, arm
            )
            if multihost.broadcast_bool(path.is_file()):
                # The file is the first process's; the others need not see it.
                progress.resumed(0 if arm == "base" else config.rounds)
                outcome = json.loads(path.read_text()) if multihost.is_primary() else {}
                adapter = runner.restored_adapter()
            else:
                adapter = runner.train()
                outcome = runner.evaluate(adapter)
                run_files.write_json(path, outcome)
            outcomes.setdefault(arm_id, []).append(outcome)
            final_adapters.setdefault(arm_id, adapter)
        if members.quality is not None:
            filter_quality.append(members.filter_record())
    if not multihost.is_primary():
        multihost.barrier("reported")
        return {}
    results = summarise(config, inputs, workdir, outcomes, filter_quality)
    results["seconds"] = {"this_process": time.monotonic() - started}
    run_files.write_json(workdir / "results.json", results)
    export_best(config, inputs, workdir, final_adapters, results)
    page.write(workdir, config, results, outcomes)
    progress.end()
    print_table(results)
    multihost.barrier("reported")
    return results


def build_clients(config, inputs, seed: int, workdir: epath.Path, progress) -> Clients:
    """Builds the simulated clients of a seed, filtered where an arm asks for it."""
    built = clients.build(config, inputs, seed, progress)
    if any("filter" in arm for arm in config.arms):
        built = filtering.filter_clients(
            config, inputs, built, seed=seed, workdir=workdir, progress=progress
        )
    return built


def arm_list(config) -> list[tuple[str, str, str]]:
    """`(arm id, algorithm, arm)` of everything to run; the base model belongs to no algorithm."""
    arms = [("base", "", "base")] if "base" in config.arms else []
    for algorithm in config.algorithms:
        for arm in config.arms:
            if arm != "base":
                arm_id = arm if len(config.algorithms) == 1 else f"{algorithm}/{arm}"
                arms.append((arm_id, algorithm, arm))
    return arms


class ArmRun:
    """One arm of one seed, from its first round (or its newest checkpoint) to its evaluation."""

    def __init__(self, config, inputs, clients, workdir, progress, seed, arm_id, algorithm, arm):
        self.config, self.inputs, self.clients = config, inputs, clients
        self.workdir, self.progress, self.seed = workdir, progress, seed
        self.arm_id, self.arm, self.algorithm = arm_id, arm, algorithm
        self.model = Decoder(inputs.lm.config, inputs.lora.scale)
        self.folder = workdir / "checkpoints" / arm_id.replace("/", "_") / f"seed{seed}"

    @functools.cached_property
    def _programs(self):
        return rounds.build(self.config, self.algorithm, self.model, self.inputs.mesh)

    def _initial_state(self):
        adapter = lora.init(jax.random.key(self.seed), self.inputs.lm.config, self.inputs.lora)
        return simulation.initial_state(self._programs, adapter, self.config.num_clients)

    def _restored(self, saved):
        state, done = saved.restore(self._initial_state())
        server = simulation.replicate(state.server, self.inputs.mesh)
        return state._replace(server=server), done

    def restored_adapter(self):
        """The adapter of a finished arm, from its newest checkpoint; None for the base model."""
        if self.arm == "base":
            return None
        saved = checkpoint.RoundCheckpoints(self.folder)
        state, _ = self._restored(saved)
        saved.close()
        return state.server.factors

    def train(self):
        """All rounds; returns the final adapter, None for the base model.

        Raises:
          Preempted: told to end; the last finished round is saved.
        """
        if self.arm == "base":
            return None
        config = self.config
        server = self._server() if "cai" in self.arm else None
        data = self.clients.filtered if "filter" in self.arm else self.clients.plain
        saved = checkpoint.RoundCheckpoints(self.folder)
        state, done = self._restored(saved)
        self.progress.resumed(done)
        try:
            for t in range(done, config.rounds):
                new, row, cai_records = self._round(state, data, server, t)
                with preemption.hold():
                    # Recorded before saved: a kill in between repeats the round, and replaces its
                    # lines, instead of losing them.
                    self._record(row, cai_records)
                    state, done = new, t + 1
                    if done % config.checkpoint_every == 0 or done == config.rounds:
                        saved.save(done, state)
                preemption.reached(self.progress.rounds_done)
        except preemption.Preempted:
            with preemption.hold():
                if done:
                    saved.save(done, state)
                saved.close()
            raise
        saved.close()
        return state.server.factors

    def _server(self):
        return constitutional.ConstitutionalStage(
            self.config,
            self.inputs,
            self.model,
            clients=self.clients,
            folder=self.workdir / "cai",
            mine=self._mine,
            seed=self.seed,
        )

    def _round(self, state, data, server, t: int):
        """`(state, row of metrics, records of CAI)` of one round."""
        config, clock = self.config, PhaseTimer()
        multihost.barrier("round")
        # Filtered local training and aggregation.
        state, figures = self._federate(state, data, t)
        clock.mark("federated")
        row = {"arm": self.arm_id, "seed": self.seed, "round": t} | figures
        row["tokens_per_second"] = row["useful_tokens"] / clock.seconds["federated"]
        self._warn(row)
        if "filter" in self.arm:
            counts = [self.clients.counts[i] for i in row["clients"] + row["no_data"]]
            row["filter"] = {k: sum(getattr(c, k) for c in counts) for k in FilterCounts._fields}
        found = []
        if server is not None:
            # Constitutional AI on the aggregated model.
            current, base = map(self._language_model, (state.server.factors, None))
            adapter, row["cai"], found = server.run(current, base, t, clock)
            adapter = simulation.replicate(multihost.broadcast(adapter), self.inputs.mesh)
            state = state._replace(server=state.server._replace(factors=adapter))
        if config.eval.every_round_prompts:
            row["eval"] = self._probe(state.server.factors)
            clock.mark("probe")
        row["seconds"] = clock.seconds
        return state, row, found

    def _federate(self, state, data, t: int):
        """`(state, figures)` after the clients' training and the server's step."""
        return rounds.run(
            self.config,
            self.algorithm,
            self._programs,
            state=state,
            base=self.inputs.base,
            data=data,
            seed=self.seed,
            t=t,
        )

    def _warn(self, row) -> None:
        """Says loudly what a round left out."""
        where = f"{self.arm_id} seed {self.seed} round {row['round'] + 1}"
        if row["excluded"]:
            names = ", ".join(map(str, row["excluded"]))
            self.progress.warn(f"{where}: update not finite, left out: client(s) {names}")
        if row["skipped"]:
            self.progress.warn(f"{where}: SKIPPED, no client was left; the model stays as it was")

    def _record(self, row, cai_records) -> None:
        t = row["round"]
        if cai_records:
            key = {"arm": self.arm_id, "seed": self.seed, "round": t}
            run_files.replace_lines(
                self.workdir / "cai" / f"round_{t:03d}.jsonl",
                self._mine,
                [key | r._asdict() for r in cai_records],
            )
        run_files.replace_lines(
            self.workdir / "metrics.jsonl",
            lambda old: self._mine(old) and old["round"] >= t,
            [row],
        )
        self.progress.round_done(row)

    def _mine(self, row: dict) -> bool:
        return row["arm"] == self.arm_id and row["seed"] == self.seed

    def _language_model(self, adapter):
        if adapter is None:
            return self.inputs.lm
        own = multihost.local(adapter, self.inputs.mesh)
        return self.inputs.lm.with_adapter(lora.Adapter(own, self.inputs.lora))

    def _probe(self, adapter) -> dict:
        """Refusal rates on a few prompts, for the curves."""
        c = self.config.eval
        lm = self._language_model(adapter)
        rates = {}
        for name in ("advbench", "over_refusal"):
            prompts = getattr(self.inputs.evals, name)[: c.every_round_prompts]
            answers = lm.generate(
                prompts, max_new_tokens=c.max_new_tokens, batch_size=c.batch_size, truncate=True
            )
            rates[name] = 100 * float(np.mean([start_refusal(a) for a in answers]))
        return rates

    def evaluate(self, adapter) -> dict:
        """Per-item outcomes of the finished arm."""
        self.progress.note(f"{self.arm_id} seed {self.seed}: evaluating")
        started = time.monotonic()
        c, judge = self.config.eval, None
        if c.judge_url and self.arm != "base" and multihost.is_primary():
            judge = ChatEndpoint(c.judge_url, c.judge_model, os.environ.get("OPENAI_API_KEY", ""))
        outcome = suite.evaluate(
            self._language_model(adapter), self.inputs.evals, c, judge, self._language_model(None)
        )
        outcome["seconds"] = time.monotonic() - started
        return outcome


def summarise(config, inputs, workdir, outcomes, filter_quality) -> dict:
    """The content of `results.json`."""
    algorithm_of = {arm_id: algorithm for arm_id, algorithm, _ in arm_list(config)}
    judge = config.eval.judge
    arms = {
        arm_id: {"algorithm": algorithm_of[arm_id]} | suite.summarise(found, judge)
        for arm_id, found in outcomes.items()
    }
    results = {
        "arms": arms,
        "seeds": list(config.seeds),
        "data": inputs.counts,
        "sources": {"advbench": config.eval.advbench, "over_refusal": config.eval.over_refusal},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": page.versions(),
    }
    if filter_quality:
        names = ("accuracy", "precision", "recall", "hmean", "auroc")
        mean = {n: float(np.mean([q[n] for q in filter_quality])) for n in names}
        results["filter"] = mean | {"per_seed": filter_quality}
    return results


def export_best(config, inputs, workdir, adapters, results) -> None:
    """Exports the adapter of `export_arm` (its first algorithm and seed), when it was run."""
    names = [n for n in adapters if n == config.export_arm or n.endswith("/" + config.export_arm)]
    if names and adapters[names[0]] is not None:
        card = model_card(config, names[0], results["arms"][names[0]])
        own = multihost.local(adapters[names[0]], inputs.mesh)
        adapter = lora.Adapter(own, inputs.lora, inputs.lm.name)
        export.export(inputs.lm, adapter, workdir / "export", card)
