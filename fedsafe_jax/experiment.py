"""One run: for each seed, algorithm and arm, the paper's round loop, then its evaluation."""

import dataclasses
import json
import os
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fedsafe_jax import checkpoint, export, records, report
from fedsafe_jax import world as world_lib
from fedsafe_jax.cai import revise as revise_lib
from fedsafe_jax.cai import train as cai_train
from fedsafe_jax.clients import build_clients
from fedsafe_jax.config import validate
from fedsafe_jax.data import chat, partition
from fedsafe_jax.evals import suite
from fedsafe_jax.evals.judges import ChatEndpoint, start_refusal
from fedsafe_jax.federated import algorithms, round
from fedsafe_jax.models import lora, loss
from fedsafe_jax.models.decoder import Decoder
from fedsafe_jax.models.sharding import CLIENTS
from fedsafe_jax.progress import Progress


def run(config, workdir: str) -> dict:
    """Runs or resumes everything the config asks for, and returns what `results.json` holds."""
    validate(config)
    started = time.monotonic()
    world = world_lib.load(config)
    workdir = pathlib.Path(workdir)
    progress = Progress(config)
    if records.claim(workdir, config.to_dict()):
        progress.note(f"continuing the run in {workdir}")
    outcomes: dict[str, list[dict]] = {}
    final_adapters: dict[str, object] = {}
    filter_quality: list[dict] = []
    for seed in config.seeds:
        clients = build_clients(config, world, seed, progress)
        for arm_id, algorithm, arm in arm_list(config):
            path = workdir / "arms" / f"{arm_id.replace('/', '_')}_seed{seed}.json"
            runner = ArmRun(config, world, clients, workdir, progress, seed, arm_id, algorithm, arm)
            if path.is_file():
                outcome, adapter = json.loads(path.read_text()), runner.restored_adapter()
            else:
                adapter = runner.train()
                outcome = runner.evaluate(adapter)
                records.write_json(path, outcome)
            outcomes.setdefault(arm_id, []).append(outcome)
            final_adapters.setdefault(arm_id, adapter)
        if clients.quality is not None:
            filter_quality.append(clients.quality._asdict())
    results = summarise(config, world, workdir, outcomes, filter_quality)
    results["seconds"] = {"this_process": time.monotonic() - started}
    records.write_json(workdir / "results.json", results)
    export_best(config, world, workdir, final_adapters, results)
    report.write(workdir, config, results, outcomes)
    progress.table(results)
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

    def _algorithm(self):
        def loss_fn(adapter, base, batch):
            return loss.packed_loss(self.model, adapter, base, batch)

        return algorithms.ALGORITHMS[self.algorithm](loss_fn, algorithms.local_optimizer())

    def _initial_state(self):
        key = jax.random.key(self.seed)
        adapter = lora.init(key, self.world.lm.config, self.world.lora)
        return self._replicated(self._algorithm().init(adapter, self.config.num_clients))

    def _replicated(self, state):
        return jax.device_put(state, NamedSharding(self.world.lm.mesh, PartitionSpec()))

    def restored_adapter(self):
        """The adapter of a finished arm, from its newest checkpoint; None for the base model."""
        if self.arm == "base":
            return None
        saved = checkpoint.RoundCheckpoints(self.folder)
        state = saved.restore(self._initial_state())
        saved.close()
        return state.adapter

    def train(self):
        """All rounds; returns the final adapter, None for the base model."""
        if self.arm == "base":
            return None
        config, lm = self.config, self.world.lm
        parallel = config.clients_in_parallel or (
            1 if jax.default_backend() == "cpu" else config.clients_per_round
        )
        round_fn = round.make_round(self._algorithm(), self.world.lm.mesh, parallel)
        cai_fn = cai_train.make_train(self.model, config.cai.beta, config.cai.dpo_weight)
        data = self.clients.filtered if "filter" in self.arm else self.clients.plain
        state = self._initial_state()
        saved = checkpoint.RoundCheckpoints(self.folder)
        first = saved.latest()
        if first:
            state = saved.restore(state)
        for t in range(first, config.rounds):
            clock = Clock()
            # Sample clients; each draws its local batches from (seed, round, client).
            cohort = partition.sample_cohort(
                self.seed, t, config.num_clients, config.clients_per_round
            )
            batches = partition.local_batches(
                data, self.seed, t, cohort, config.local_steps, config.batch_size, config.seq_len
            )
            weights = np.array([len(data[i]) for i in cohort], np.float32)
            useful = int((batches.segment_ids > 0).sum())
            batches, ids, weights = round.pad_cohort(
                batches, cohort, weights, self.world.lm.mesh.shape[CLIENTS]
            )
            clock.lap("data")
            # Local training and aggregation, one program.
            state, metrics = round_fn(
                state, lm.params, batches, ids, weights, jnp.float32(rate(config, t))
            )
            metrics = jax.device_get(metrics)
            clock.lap("federated")
            row = {
                "arm": self.arm_id,
                "seed": self.seed,
                "round": t,
                "loss": float(metrics.losses[: len(cohort)].mean()),
                "loss_last_step": float(metrics.losses[: len(cohort), -1].mean()),
                "delta_norms": [float(n) for n in metrics.delta_norms[: len(cohort)]],
                "update_norm": float(metrics.update_norm),
                "clients": cohort.tolist(),
                "useful_tokens": useful,
                "tokens_per_second": useful / clock.seconds["federated"],
            }
            if not np.isfinite(row["update_norm"]):
                raise FloatingPointError(
                    f"{self.arm_id}, round {t}: the update is not finite; lower learning_rate "
                    f"({config.learning_rate})."
                )
            if "filter" in self.arm:
                counts = [self.clients.counts[i] for i in cohort]
                row["filter"] = {k: sum(getattr(c, k) for c in counts) for k in counts[0]._fields}
            if "cai" in self.arm:
                state, row["cai"] = self._constitutional(state, cai_fn, t, clock)
            if config.eval.every_round_prompts:
                row["eval"] = self._probe(state.adapter)
                clock.lap("probe")
            saved.save(t + 1, state)
            clock.lap("checkpoint")
            row["seconds"] = clock.seconds
            records.replace_lines(
                self.workdir / "metrics.jsonl",
                lambda old, t=t: self._mine(old) and old["round"] >= t,
                [row],
            )
            self.progress.round_done(row)
        saved.close()
        return state.adapter

    def _mine(self, row: dict) -> bool:
        return row["arm"] == self.arm_id and row["seed"] == self.seed

    def _language_model(self, adapter):
        return dataclasses.replace(self.world.lm, adapter=adapter)

    def _constitutional(self, state, cai_fn, t: int, clock):
        """Light CAI on the aggregated model: generate, critique, revise, then SFT and DPO."""
        c, world = self.config.cai, self.world
        rng = np.random.default_rng([self.seed, t, 2])

        def some(pool, count):
            return [pool[i] for i in rng.permutation(len(pool))[:count]]

        harmful = [e.prompt for e in some(world.red_team, c.red_team_prompts)]
        benign = [e.prompt for e in some(world.replay, c.benign_prompts)]
        current = self._language_model(state.adapter)
        reviser = current if c.reviser == "global" else self._language_model(None)

        def answering(lm, temperature):
            def generate(threads, call):
                seed = int(np.random.default_rng([self.seed, t, 3, call]).integers(2**31))
                return lm.answer_dialogues(
                    threads, c.max_new_tokens, temperature, seed=seed, batch_size=32, cut=True
                )

            return generate

        found = revise_lib.revise(
            harmful + benign,
            world.principles,
            answering(current, c.temperature),
            answering(reviser, 0.0),
            (self.seed, t, 4),
            wanted=[True] * len(harmful) + [False] * len(benign),
            refuses=start_refusal,
        )
        clock.lap("cai_generate")
        counts: dict[str, int] = {"kept": 0}
        for record in found:
            counts[record.dropped or "kept"] = counts.get(record.dropped or "kept", 0) + 1
        kept = [r for r in found if not r.dropped]

        def encode(prompt, response):
            return chat.encode(
                world.lm.tokenizer, (("user", prompt),), response, self.config.seq_len
            )

        replay = some(world.replay, c.replay_examples)
        sft = [encode(r.prompt, r.revision) for r in kept] + [
            chat.encode(world.lm.tokenizer, e.messages, e.response, self.config.seq_len)
            for e in replay
        ]
        pairs = [
            (encode(r.prompt, r.revision), encode(r.prompt, r.initial)) for r in kept if r.preferred
        ]
        sft = [e for e in sft if e is not None]
        pairs = [(a, b) for a, b in pairs if a is not None and b is not None]
        batches = cai_train.make_batches(
            sft,
            pairs,
            c.steps,
            c.batch_size,
            c.pairs_per_step,
            self.config.seq_len,
            (self.seed, t, 5),
        )
        local = current.on_one_device()
        adapter, sft_losses, dpo_losses = cai_fn(
            local.adapter,
            local.params,
            batches,
            jnp.float32(c.learning_rate * decay(self.config, t)),
        )
        counts |= {
            "pairs": len(pairs),
            "replay": len(replay),
            "sft_loss": float(sft_losses.mean()),
            "dpo_loss": float(dpo_losses.mean()),
        }
        clock.lap("cai_train")
        lines = [{"arm": self.arm_id, "seed": self.seed, "round": t} | r._asdict() for r in found]
        records.replace_lines(self.workdir / "cai" / f"round_{t:03d}.jsonl", self._mine, lines)
        return state._replace(adapter=self._replicated(adapter)), counts

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
        if c.judge_url and self.arm != "base":
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
        self.seconds[phase] = round_to(now - self._last)
        self._last = now


def round_to(seconds: float) -> float:
    """Milliseconds are enough, and never zero."""
    return max(float(f"{seconds:.3f}"), 1e-3)


def rate(config, t: int) -> float:
    """Cosine over rounds from `learning_rate` to `min_learning_rate` (OpenFedLLM's schedule)."""
    low, high = config.min_learning_rate, config.learning_rate
    return low + 0.5 * (high - low) * (1 + np.cos(np.pi * t / config.rounds))


def decay(config, t: int) -> float:
    """The clients' rate as a share of its start. CAI follows it: at a constant rate its last
    rounds outweigh what the clients still learn, and over-refusal grows."""
    return rate(config, t) / config.learning_rate


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
        "versions": report.versions(),
    }
    if filter_quality:
        names = ("accuracy", "precision", "recall", "hmean")
        mean = {n: float(np.mean([q[n] for q in filter_quality])) for n in names}
        results["filter"] = mean | {"per_seed": filter_quality}
    return results


def export_best(config, world, workdir, adapters, results) -> None:
    """Exports the adapter of `export_arm` (its first algorithm and seed), when it was run."""
    names = [n for n in adapters if n == config.export_arm or n.endswith("/" + config.export_arm)]
    if names and adapters[names[0]] is not None:
        card = export.model_card(config, names[0], results["arms"][names[0]])
        export.export(world.lm, adapters[names[0]], world.lora, workdir / "export", card)
