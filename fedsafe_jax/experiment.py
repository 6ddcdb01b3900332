"""One run: for each seed, algorithm and arm, the paper's round loop, then its evaluation."""

import dataclasses
import functools
import json
import os
import time

import jax
import numpy as np
from etils import epath

from fedsafe_jax.evals import suite
from fedsafe_jax.evals.judges import ChatEndpoint, start_refusal
from fedsafe_jax.federated import simulation
from fedsafe_jax.filters.actions import FilterCounts
from fedsafe_jax.models import lora
from fedsafe_jax.models.decoder import Decoder
from fedsafe_jax.pipeline import constitutional, export, rounds
from fedsafe_jax.pipeline import inputs as world_lib
from fedsafe_jax.pipeline.clients import build_clients
from fedsafe_jax.report import page
from fedsafe_jax.runtime import checkpoint, multihost, preemption, run_files
from fedsafe_jax.runtime.progress import Progress
from fedsafe_jax.validation import validate


def run(config, workdir: str, world=None, build=build_clients, arm_run=None) -> dict:
    """Runs or resumes everything the config asks for.

    Args:
      config: of the run.
      workdir: of its files.
      world: what it reads; None to read it.
      build: `(config, world, seed, workdir, progress) -> Clients`.
      arm_run: `ArmRun`, or what takes its arguments and trains clients elsewhere.

    Returns:
      What `results.json` holds; {} in all processes but the first.
    """
    validate(config)
    started = time.monotonic()
    world = world or world_lib.load(config)
    workdir = epath.Path(workdir)
    progress = Progress(config)
    if run_files.claim(workdir, config.to_dict()):
        progress.note(f"continuing the run in {workdir}")
    outcomes: dict[str, list[dict]] = {}
    final_adapters: dict[str, object] = {}
    filter_quality: list[dict] = []
    for seed in config.seeds:
        clients = build(config, world, seed, workdir, progress)
        for arm_id, algorithm, arm in arm_list(config):
            path = workdir / "arms" / f"{arm_id.replace('/', '_')}_seed{seed}.json"
            runner = (arm_run or ArmRun)(
                config, world, clients, workdir, progress, seed, arm_id, algorithm, arm
            )
            if multihost.agreed(path.is_file()):
                # The file is the first process's; the others need not see it.
                progress.found(0 if arm == "base" else config.rounds)
                outcome = json.loads(path.read_text()) if multihost.is_first() else {}
                adapter = runner.restored_adapter()
            else:
                adapter = runner.train()
                outcome = runner.evaluate(adapter)
                run_files.write_json(path, outcome)
            outcomes.setdefault(arm_id, []).append(outcome)
            final_adapters.setdefault(arm_id, adapter)
        if clients.quality is not None:
            filter_quality.append(clients.filter_record())
    if not multihost.is_first():
        multihost.meet("reported")
        return {}
    results = summarise(config, world, workdir, outcomes, filter_quality)
    results["seconds"] = {"this_process": time.monotonic() - started}
    run_files.write_json(workdir / "results.json", results)
    export_best(config, world, workdir, final_adapters, results)
    page.write(workdir, config, results, outcomes)
    progress.table(results)
    multihost.meet("reported")
    return results


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

    def __init__(self, config, world, clients, workdir, progress, seed, arm_id, algorithm, arm):
        self.config, self.world, self.clients = config, world, clients
        self.workdir, self.progress, self.seed = workdir, progress, seed
        self.arm_id, self.arm, self.algorithm = arm_id, arm, algorithm
        self.model = Decoder(world.lm.config, world.lora.scale)
        self.folder = workdir / "checkpoints" / arm_id.replace("/", "_") / f"seed{seed}"

    @functools.cached_property
    def _programs(self):
        return rounds.build(self.config, self.algorithm, self.model, self.world.mesh)

    def _initial_state(self):
        adapter = lora.init(jax.random.key(self.seed), self.world.lm.config, self.world.lora)
        return simulation.initial_state(self._programs, adapter, self.config.num_clients)

    def _restored(self, saved):
        state, done = saved.restore(self._initial_state())
        server = simulation.replicate(state.server, self.world.mesh)
        return state._replace(server=server), done

    def restored_adapter(self):
        """The adapter of a finished arm, from its newest checkpoint; None for the base model."""
        if self.arm == "base":
            return None
        saved = checkpoint.RoundCheckpoints(self.folder)
        state, _ = self._restored(saved)
        saved.close()
        return state.server.adapter

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
        self.progress.found(done)
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
        return state.server.adapter

    def _server(self):
        return constitutional.Server(
            self.config, self.world, self.model, self.clients, self.workdir / "cai", self._mine,
            self.seed,
        )  # fmt: skip

    def _round(self, state, data, server, t: int):
        """`(state, row of metrics, records of CAI)` of one round."""
        config, clock = self.config, Clock()
        multihost.meet("round")
        # Filtered local training and aggregation.
        state, figures = self._federate(state, data, t)
        clock.lap("federated")
        row = {"arm": self.arm_id, "seed": self.seed, "round": t} | figures
        row["tokens_per_second"] = row["useful_tokens"] / clock.seconds["federated"]
        self._warn(row)
        if "filter" in self.arm:
            counts = [self.clients.counts[i] for i in row["clients"] + row["no_data"]]
            row["filter"] = {k: sum(getattr(c, k) for c in counts) for k in FilterCounts._fields}
        found = []
        if server is not None:
            # Constitutional AI on the aggregated model.
            current, base = map(self._language_model, (state.server.adapter, None))
            adapter, row["cai"], found = server.run(current, base, t, clock)
            adapter = simulation.replicate(multihost.same(adapter), self.world.mesh)
            state = state._replace(server=state.server._replace(adapter=adapter))
        if config.eval.every_round_prompts:
            row["eval"] = self._probe(state.server.adapter)
            clock.lap("probe")
        row["seconds"] = clock.seconds
        return state, row, found

    def _federate(self, state, data, t: int):
        """`(state, figures)` after the clients' training and the server's step."""
        return rounds.run(
            self.config, self.algorithm, self._programs, state, self.world.base, data, self.seed, t
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
        own = multihost.local(adapter, self.world.mesh)
        return dataclasses.replace(self.world.lm, adapter=own)

    def _probe(self, adapter) -> dict:
        """Refusal rates on a few prompts, for the curves."""
        c = self.config.eval
        lm = self._language_model(adapter)
        rates = {}
        for name in ("advbench", "over_refusal"):
            prompts = getattr(self.world.evals, name)[: c.every_round_prompts]
            answers = lm.generate(
                prompts, max_new_tokens=c.max_new_tokens, batch_size=c.batch_size, cut=True
            )
            rates[name] = 100 * float(np.mean([start_refusal(a) for a in answers]))
        return rates

    def evaluate(self, adapter) -> dict:
        """Per-item outcomes of the finished arm."""
        self.progress.note(f"{self.arm_id} seed {self.seed}: evaluating")
        started = time.monotonic()
        c, judge = self.config.eval, None
        if c.judge_url and self.arm != "base" and multihost.is_first():
            judge = ChatEndpoint(c.judge_url, c.judge_model, os.environ.get("OPENAI_API_KEY", ""))
        outcome = suite.evaluate(
            self._language_model(adapter), self.world.evals, c, judge, self._language_model(None)
        )
        outcome["seconds"] = time.monotonic() - started
        return outcome


class Clock:
    """Seconds by phase of a round."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, phase: str) -> None:
        now = time.monotonic()
        self.seconds[phase] = round_to(self.seconds.get(phase, 0.0) + now - self._last)
        self._last = now


def round_to(seconds: float) -> float:
    """Milliseconds are enough, and never zero."""
    return max(float(f"{seconds:.3f}"), 1e-3)


def summarise(config, world, workdir, outcomes, filter_quality) -> dict:
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
        "data": world.counts,
        "sources": {"advbench": config.eval.advbench, "over_refusal": config.eval.over_refusal},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": page.versions(),
    }
    if filter_quality:
        names = ("accuracy", "precision", "recall", "hmean", "auroc")
        mean = {n: float(np.mean([q[n] for q in filter_quality])) for n in names}
        results["filter"] = mean | {"per_seed": filter_quality}
    return results


def export_best(config, world, workdir, adapters, results) -> None:
    """Exports the adapter of `export_arm` (its first algorithm and seed), when it was run."""
    names = [n for n in adapters if n == config.export_arm or n.endswith("/" + config.export_arm)]
    if names and adapters[names[0]] is not None:
        card = export.model_card(config, names[0], results["arms"][names[0]])
        own = multihost.local(adapters[names[0]], world.mesh)
        export.export(world.lm, own, world.lora, workdir / "export", card)
