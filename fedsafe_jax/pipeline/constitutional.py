"""Constitutional AI on the aggregated model: probe, generate, criticise, revise, train."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from fedsafe_jax import random_streams
from fedsafe_jax.cai import forms, given
from fedsafe_jax.cai.revise import (
    DATA,
    Generate,
    Judge,
    Record,
    Rules,
    from_row,
    parse_check,
    revise,
    tally,
)
from fedsafe_jax.cai.schedule import LIMIT, SCHEDULES, Amount
from fedsafe_jax.cai.steps import Step
from fedsafe_jax.cai.train import make_step
from fedsafe_jax.data.examples import Example
from fedsafe_jax.evals import judges
from fedsafe_jax.evals.task import subset
from fedsafe_jax.federated.mesh import spans_hosts
from fedsafe_jax.federated.schedules import round_rate
from fedsafe_jax.inference.chat_session import ChatSession
from fedsafe_jax.inference.language_model import LanguageModel
from fedsafe_jax.models.decoder import Decoder
from fedsafe_jax.models.sharding import is_shared
from fedsafe_jax.pipeline.clients import Clients
from fedsafe_jax.pipeline.evaluation import judge_tools
from fedsafe_jax.pipeline.inputs import RunInputs
from fedsafe_jax.pipeline.own_answers import OwnAnswers
from fedsafe_jax.pipeline.refusal_probe import Probe
from fedsafe_jax.pipeline.revision_rows import RevisionRows, read_recipe, training_counts
from fedsafe_jax.pipeline.rounds import learning_rates
from fedsafe_jax.random_streams import Purpose, generator
from fedsafe_jax.runtime import multihost, run_files
from fedsafe_jax.runtime.progress import PhaseTimer

BATCH = 32  # dialogues generated at once


class ConstitutionalStage:
    """The server's Constitutional AI for one arm and seed.

    Args:
      config, inputs: config and inputs of the run.
      model: the decoder that adapters belong to.
      clients: clients of the seed; their filter judges revisions where the config says so.
      own: the base's own answers to harmless requests, replayed with the benign pairs.
      folder: folder of the records, `cai/`.
      mine: tells whether a row of the records is of this arm and seed.
      seed: seed of the run; what is drawn depends on it and the round alone.
    """

    def __init__(
        self,
        config: ConfigDict,
        inputs: RunInputs,
        model: Decoder,
        *,
        clients: Clients,
        own: OwnAnswers,
        folder: epath.Path,
        mine: Callable[[dict], bool],
        seed: int,
    ):
        self.config, self.inputs, self.clients, self.seed = config, inputs, clients, seed
        self.own, self.folder, self.mine = own, folder, mine
        self.tokenizer = inputs.lm.tokenizer
        self.schedule = SCHEDULES[config.cai.schedule]
        self.recipe = read_recipe(config)
        self.rows = RevisionRows(config, self.tokenizer, recipe=self.recipe, seed=seed)
        # Where CPU cores share the arrays one of them trains, with the threads of all: dealing the
        # rows of a step to cores is no faster, and sums in another order than one process does.
        self.on_one = is_shared(model.config.mesh)
        if self.on_one:
            model = Decoder(dataclasses.replace(model.config, mesh=None), model.lora_scale)
        self.init_optimizer, self.step = make_step(model, self.recipe)
        self._past: list[tuple[int, Record]] | None = None
        self.red_team, self.given, self.probe_prompts = inputs.red_team, inputs.given, []
        if self.schedule.steps_after_probe:
            # The estimate must not be of prompts that were trained on.
            probes = subset(inputs.red_team, config.cai.probe_prompts, Purpose.PROBE)
            self.probe_prompts = [e.messages for e in probes]
            probed = {e.dialogue for e in probes}
            self.red_team = [e for e in inputs.red_team if e.dialogue not in probed]
            asked = given.examples_of(inputs.given)
            self.given = [
                r for r, e in zip(inputs.given, asked, strict=True) if e.dialogue not in probed
            ]

    def run(
        self, current: LanguageModel, base: LanguageModel, t: int, clock: PhaseTimer
    ) -> tuple[dict, dict, list[Record]]:
        """Runs one round.

        Args:
          current: the global model.
          base: the model without an adapter.
          t: number of the round, from 0.
          clock: told which phase has ended.

        Returns:
          The new LoRA factors, counts for the metrics, and the new records.
        """
        c = self.config.cai
        amount = self.schedule.amount(t == self.config.rounds - 1)
        if self.schedule.steps_after_probe:
            probe, share = self._probe(clock), 1.0
            num_steps = probe(current)
        else:
            probe, share = None, learning_rate_share(self.config, t)
            num_steps = c.steps * amount.steps
        counts = {"schedule": c.schedule, "kept": 0, "steps": 0}
        factors, records = current.factors, []
        if num_steps:
            rng = generator(Purpose.CAI_PROMPTS, self.seed, t)
            earlier = self._earlier(t) if DATA[c.data].reuses else []
            ready = self._given(amount, t) if DATA[c.data].given else []
            if DATA[c.data].renews or not (earlier or DATA[c.data].given):
                records = self._revise(current, base, amount, rng, t)
                self._past = [*(self._past or []), *((t, r) for r in records)]
                clock.mark("cai_generate")
            kept = [r for r in [*earlier, *ready, *records] if not r.dropped]
            replay = _sample(self._replayed, self._replay_count(amount, len(kept)), rng)
            counts |= {"reused": len(earlier), "replay": len(replay)} | tally(ready + records)
            if self.inputs.harmless:
                counts["own_answers"] = self.own.counts
            counts["tokens_generated"] = self._count_tokens(_generated(records))
            imitation, replayed, lost, notes = self.rows.imitation(kept, replay)
            triples = self.rows.triples(kept)
            counts |= {"pairs": len(triples), "lost": lost, "notes": notes}
            if imitation:  # else the adapter stays as it is
                if math.isinf(num_steps):
                    num_steps = math.ceil(len(imitation) / c.batch_size)
                limit = LIMIT * c.steps if probe else int(num_steps)
                data = self.rows.steps(limit, imitation, replayed, triples=triples, t=t)
                learning_rate = jnp.float32(c.learning_rate * share)
                factors, losses = self._train(current, data, int(num_steps), learning_rate, probe)
                counts |= training_counts(data[: len(losses)], losses)
            clock.mark("cai_train")
        if probe is not None:
            counts["probes"] = probe.results
            counts["tokens_generated"] = counts.get("tokens_generated", 0) + probe.tokens
        return factors, counts, records

    @property
    def _replayed(self) -> list[Example]:
        """What is replayed: benign pairs, and harmless requests with the base's own answers."""
        return [*self.inputs.replay, *self.own.examples]

    def _probe(self, clock: PhaseTimer) -> Probe:
        c = self.config.cai

        def decide(refused: float, high: float) -> int:
            return self.schedule.steps_after_probe(refused, high, c.target, c.steps)

        refuses = judges.refuses(c.probe_judge, judge_tools(self.config))
        return Probe(
            self.probe_prompts, decide, self._count_tokens, clock, refuses=self._agreed(refuses)
        )

    def _earlier(self, t: int) -> list[Record]:
        """Records of earlier rounds: after a resume from disk, then as they are made."""
        if self._past is None:
            self._past = []
            for path in sorted(self.folder.glob("round_*.jsonl")):
                for row in filter(self.mine, run_files.read_lines(path, run_files.OF_A_ROUND)):
                    if row["round"] < t:  # later ones are of rounds that are repeated now
                        self._past.append((row["round"], from_row(row)))
        return [record for _, record in self._past]

    def _given(self, amount: Amount, t: int) -> list[Record]:
        """Ready-made records of round `t`: what its steps read, or all of them in an epoch."""
        if math.isinf(amount.prompts):
            return self.given
        return given.rows_of_round(
            self.given,
            self._rows_a_round(),
            t,
            generator=lambda epoch: generator(Purpose.CAI_GIVEN, self.seed, epoch),
        )

    def _rows_a_round(self) -> int:
        """Ready-made records that a light round reads once, beside its replay."""
        c = self.config.cai
        return given.rows_a_round(
            self.recipe.imitates_revisions,
            steps=c.steps,
            batch=c.batch_size,
            replay=min(c.replay_examples, len(self._replayed)),
            pairs=c.pairs_per_step,
        )

    def _replay_count(self, amount: Amount, kept: int) -> int:
        c = self.config.cai
        if math.isinf(amount.prompts) and DATA[c.data].given:
            return round(kept * c.replay_examples / self._rows_a_round())
        if math.isinf(amount.prompts):  # as many for each revision as in a light round
            return round(kept * c.replay_examples / max(c.red_team_prompts + c.benign_prompts, 1))
        return c.replay_examples

    def _revise(
        self,
        current: LanguageModel,
        base: LanguageModel,
        amount: Amount,
        rng: np.random.Generator,
        t: int,
    ) -> list[Record]:
        """Draws prompts, and has them answered, criticised and revised."""
        c = self.config.cai
        num_red = len(self.red_team)
        if not math.isinf(amount.prompts):
            num_red = min(math.ceil(c.red_team_prompts * amount.prompts), num_red)
        # Benign prompts keep their proportion to the red-team prompts, whose pool may be too small.
        num_benign = math.ceil(c.benign_prompts * (num_red / c.red_team_prompts))
        harmful = [e.messages for e in _sample(self.red_team, num_red, rng)]
        benign = [e.messages for e in _sample(self.inputs.replay, num_benign, rng)]
        wanted = [True] * len(harmful) + [False] * len(benign)
        checks = {}
        wished = parse_check(c.check)
        if wished.refusal:
            refuses = judges.refuses(wished.refusal, judge_tools(self.config))
            checks["rules"] = Rules(wanted, self._agreed(refuses))
        if wished.judge:
            unsafe, threshold = self.clients.judge()
            checks["judge"] = Judge(wanted, self._agreed(unsafe), threshold)
        session = ChatSession(current, BATCH)
        # One session for both where the model is the same: its cache holds what was read before.
        revising = ChatSession(base, BATCH) if c.reviser == "base" else session
        seed = (self.seed, t)
        return revise(
            harmful + benign,
            self.inputs.constitution,
            make_generate_fn(c.max_new_tokens, seed, session, temperature=c.temperature),
            reviser=make_generate_fn(c.max_new_tokens, seed, revising, temperature=0.0),
            seed=seed,
            rounds=c.revision_rounds,
            num_few_shots=c.few_shots,
            **checks,
            only_wrong=c.revise == "wrong",
            replace=c.replace_dropped,
        )

    def _agreed(self, judge: Callable) -> Callable:
        """Returns a judge by what the first process's says where all of them generate together.

        Each has a filter or model of its own, and what it says decides which programs come next.
        """
        if not spans_hosts(self.inputs.mesh):
            return judge
        return lambda dialogues, answers: multihost.broadcast(np.asarray(judge(dialogues, answers)))

    def _count_tokens(self, texts: Sequence[str]) -> int:
        if not texts:
            return 0
        return sum(map(len, self.tokenizer(texts, add_special_tokens=False)["input_ids"]))

    def _train(
        self,
        current: LanguageModel,
        data: Sequence[Step],
        num_steps: int,
        learning_rate: jax.Array,
        probe: Probe | None,
    ) -> tuple[dict, list[dict]]:
        """`(LoRA factors, losses of each step taken)`.

        Without a probe `num_steps` steps are taken. With one it is asked again after these, for the
        number of steps to go on with, until it says 0 or the data end.
        """
        own = current.on_one_device() if self.on_one else current
        reference = own.factors if self.config.cai.reference == "global" else None
        factors, state = own.factors, self.init_optimizer(own.factors)
        losses: list[dict] = []
        while num_steps and len(losses) < len(data):
            for step in data[len(losses) : len(losses) + num_steps]:
                factors, state, values = self.step(
                    factors, state, reference, own.params, step, learning_rate
                )
                losses.append(values)
            num_steps = probe(current, factors) if probe else 0
        return factors, losses


def learning_rate_share(config: ConfigDict, t: int) -> float:
    """Computes the clients' learning rate in round `t` as a share of its start.

    The rate of CAI decays with it: at a constant rate the last rounds outweigh what the clients
    still learn, and over-refusal grows.
    """
    return round_rate(learning_rates(config), t) / config.learning_rate


def make_generate_fn(
    max_new_tokens: int,
    seed: Sequence[int],
    session: ChatSession,
    temperature: float,
    chat_form: bool = True,
    purpose: Purpose = Purpose.CAI_SAMPLES,
) -> Generate:
    """Builds the function by which a model answers threads in `cai.revise.revise`.

    Args:
      max_new_tokens: most tokens of an answer, critique or revision.
      seed: seed of the samples and their place, such as (seed, round); they also depend on the
        number of the call.
      session: session with a chat model, or with one whose template is `forms.DIALOGUE`.
      temperature: temperature of sampling; 0 for greedy.
      chat_form: whether threads become chats of user and assistant.
      purpose: stream of the samples.
    """

    def generate(
        threads: Sequence[Sequence[tuple[str, str]]], call: int
    ) -> tuple[list[str], np.ndarray]:
        call_seed = random_streams.seed(purpose, *seed, call)
        return session.answer_dialogues(
            [forms.as_chat(thread) if chat_form else thread for thread in threads],
            max_new_tokens,
            temperature,
            seed=call_seed,
            truncate=True,
        )

    return generate


def _sample(pool: Sequence[Example], count: int, rng: np.random.Generator) -> list[Example]:
    return [pool[i] for i in rng.permutation(len(pool))[:count]]


def _generated(records: Sequence[Record]) -> list[str]:
    """All texts that were generated for the records."""
    said = [(r.initial, "" if r.replaced else r.revision, r.critique) for r in records]
    texts = [text for each in said for text in each]
    return texts + [text for r in records for _, *pair in r.earlier for text in pair]
