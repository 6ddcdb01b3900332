"""Constitutional AI on the aggregated model: probe, generate, criticise, revise, train."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from fedsafe_jax.cai import derta, forms, schedule
from fedsafe_jax.cai import revise as revise_lib
from fedsafe_jax.cai import train as train_lib
from fedsafe_jax.data import chat
from fedsafe_jax.data.examples import Example
from fedsafe_jax.data.refusals import start_refusal
from fedsafe_jax.evals.statistics import wilson
from fedsafe_jax.evals.task import subset
from fedsafe_jax.federated.schedules import round_rate
from fedsafe_jax.inference.chat_session import ChatSession
from fedsafe_jax.pipeline.rounds import learning_rates
from fedsafe_jax.runtime import run_files

BATCH = 32  # dialogues generated at once
PROBED = 64  # prompts of a probe asked at once; no more where these show that CAI is needed
PROBE_TOKENS = 10  # of an answer: a refusal shows in its first words


def decay(config, t: int) -> float:
    """The clients' rate as a share of its start. CAI follows it: at a constant rate its last
    rounds outweigh what the clients still learn, and over-refusal grows."""
    return round_rate(learning_rates(config), t) / config.learning_rate


def recipe(config) -> train_lib.Recipe:
    """How the config trains."""
    c = config.cai
    return train_lib.Recipe(
        tuple(c.losses),
        tuple(c.weights),
        c.beta,
        batch_size=c.batch_size,
        pairs_per_step=c.pairs_per_step,
        seq=config.seq_len,
    )


class ConstitutionalStage:
    """The server's CAI for one arm and seed.

    Args:
      config, inputs: of the run.
      model: the decoder that adapters belong to.
      clients: of the seed; their filter judges revisions where the config says so.
      folder: of the records, `cai/`.
      mine: `row -> bool`, whether a record is of this arm and seed.
      seed: what is drawn depends on it and the round alone.
    """

    def __init__(self, config, inputs, model, clients, folder: epath.Path, mine, seed: int):
        self.config, self.inputs, self.clients, self.seed = config, inputs, clients, seed
        self.folder, self.mine = folder, mine
        self.recipe = recipe(config)
        self.start, self.step = train_lib.make_step(model, self.recipe)
        self.tokenizer = inputs.lm.tokenizer
        self._past: list[tuple[int, revise_lib.Record]] | None = None
        self.red_team, self.probes = inputs.red_team, []
        if config.cai.schedule == "adaptive":
            # The estimate must not be of prompts that were trained on.
            self.probes = subset(inputs.red_team, config.cai.probe_prompts)
            asked = {e.prompt for e in self.probes}
            self.red_team = [e for e in inputs.red_team if e.prompt not in asked]

    def run(self, current, base, t: int, clock):
        """One round.

        Args:
          current, base: the global model, and the model without an adapter.
          t: the round.
          clock: has a `lap`.

        Returns:
          `(new adapter, counts for the metrics, new records)`.
        """
        c, config = self.config.cai, self.config
        probe, share = None, decay(config, t)
        # A light round's prompts, however few steps: what teaches are answers that are harmful.
        amount = schedule.amount(c.schedule, t == config.rounds - 1)
        steps = c.steps * amount.steps
        if c.schedule == "adaptive":
            probe, share = Probe(self, clock), 1.0
            steps = probe(current)
        counts = {"schedule": c.schedule, "kept": 0, "steps": 0}
        adapter, found = current.factors, []
        if steps:
            rng = np.random.default_rng([self.seed, t, 2])
            earlier = self._earlier(t) if c.data != "on_policy" else []
            if c.data != "cached" or not earlier:
                found = self._revise(current, base, amount, rng, t)
                self._past = [*(self._past or []), *((t, r) for r in found)]
                clock.mark("cai_generate")
            said = [text for r in found for text in (r.initial, r.critique, r.revision)]
            said += [text for r in found for _, *pair in r.earlier for text in pair]
            kept = [r for r in [*earlier, *found] if not r.dropped]
            replay = _some(self.inputs.replay, self._replay_count(amount, len(kept)), rng)
            counts |= {"reused": len(earlier), "replay": len(replay)} | revise_lib.tally(found)
            counts["tokens_generated"] = self.tokens(said)
            adapter, trained = self._train(
                current, kept, replay, steps=steps, t=t, share=share, probe=probe
            )
            counts |= trained
            clock.mark("cai_train")
        if probe is not None:
            counts["probes"] = probe.found
            counts["tokens_generated"] = counts.get("tokens_generated", 0) + probe.tokens
        return adapter, counts, found

    def _earlier(self, t: int) -> list[revise_lib.Record]:
        """Records of the rounds before: a resumed run's from disk, then as they come."""
        if self._past is None:
            self._past = []
            for path in sorted(self.folder.glob("round_*.jsonl")):
                for row in filter(self.mine, run_files.read_lines(path)):
                    found = revise_lib.Record(**{f: row[f] for f in revise_lib.Record._fields})
                    if row["round"] < t:  # others are of a round that is repeated now
                        self._past.append((row["round"], found))
        return [record for _, record in self._past]

    def _count(self, asked: int, share: float, pool: int) -> int:
        return pool if math.isinf(share) else min(math.ceil(asked * share), pool)

    def _replay_count(self, amount, kept: int) -> int:
        c = self.config.cai
        if math.isinf(amount.prompts):  # as many for each revision as in a light round
            return round(kept * c.replay_examples / max(c.red_team_prompts + c.benign_prompts, 1))
        return c.replay_examples

    def _revise(self, current, base, amount, rng, t: int) -> list[revise_lib.Record]:
        c = self.config.cai
        red = self._count(c.red_team_prompts, amount.prompts, len(self.red_team))
        share = red / c.red_team_prompts
        harmful = [e.prompt for e in _some(self.red_team, red, rng)]
        benign = [
            e.prompt for e in _some(self.inputs.replay, math.ceil(c.benign_prompts * share), rng)
        ]
        wanted = [True] * len(harmful) + [False] * len(benign)
        checks = {}
        if c.check in ("rules", "both"):
            checks["rules"] = revise_lib.Rules(wanted, start_refusal)
        if c.check in ("filter", "both"):
            checks["judge"] = revise_lib.Judge(wanted, *self.clients.judge())
        speak = functools.partial(make_generate_fn, c.max_new_tokens, [self.seed, t, 3])
        talk = reviser = ChatSession(current, BATCH)
        if c.reviser == "base":
            reviser = ChatSession(base, BATCH)
        return revise_lib.revise(
            harmful + benign,
            self.inputs.constitution,
            speak(talk, c.temperature),
            reviser=speak(reviser, 0.0),
            seed=(self.seed, t, 4),
            rounds=c.revision_rounds,
            few_shots=c.few_shots,
            **checks,
            only_wrong=c.revise == "wrong",
        )

    def tokens(self, texts) -> int:
        """As the tokenizer counts them."""
        if not texts:
            return 0
        return sum(map(len, self.tokenizer(texts, add_special_tokens=False)["input_ids"]))

    def _encode(self, prompt: str, response: str):
        return chat.encode(self.tokenizer, (("user", prompt),), response, self.config.seq_len)

    def _train(self, current, kept, replay, steps: float, t: int, share: float, probe):
        """`(adapter, counts)`; without anything to imitate the adapter stays as it is.

        Args:
          current: the global model.
          kept, replay: what is learned.
          steps: infinity for an epoch; with a probe, until that asks for no more.
          t: the round.
          share: of the learning rate.
          probe: a `Probe` or None.
        """
        c = self.config.cai
        imitation = [
            chat.encode(self.tokenizer, e.messages, e.response, self.config.seq_len) for e in replay
        ]
        if "sft" in self.recipe.losses:
            imitation += [self._encode(r.prompt, r.revision) for r in kept]
        imitation = [e for e in imitation if e is not None]
        triples = [derta.Triple(r.prompt, r.initial, r.revision) for r in kept if r.preferred]
        if not imitation:
            return current.factors, {"pairs": len(triples), "steps": 0}
        # Until the next probe, if there is one.
        leg = math.ceil(len(imitation) / c.batch_size) if math.isinf(steps) else int(steps)
        refusal = 0
        if "derta" in self.recipe.losses:
            refusal = derta.refusal_token(self.tokenizer, c.refusal_word)
        data = train_lib.steps(
            self.recipe,
            schedule.LIMIT * c.steps if probe else leg,
            imitation,
            triples=triples,
            encode=self._encode,
            seed=(self.seed, t, 5),
            tokenizer=self.tokenizer,
            refusal=refusal,
        )
        local = current.on_one_device()
        reference = local.factors if c.reference == "global" else None
        adapter, state = local.factors, self.start(local.factors)
        learning_rate = jnp.float32(c.learning_rate * share)
        found = []
        while leg and len(found) < len(data):
            for step in data[len(found) : len(found) + leg]:
                adapter, state, losses = self.step(
                    adapter, state, reference, local.params, step, learning_rate
                )
                found.append(losses)
            leg = probe(current, adapter) if probe else 0
        used = data[: len(found)]
        rows = [r for s in used for r in (s.imitation, s.pairs and s.pairs.rows, s.derta) if r]
        names = sorted({name for losses in found for name in losses})
        return adapter, {
            "pairs": len(triples),
            "steps": len(found),
            "tokens_trained": int(sum((r.segment_ids > 0).sum() for r in rows)),
        } | {
            f"{name}_loss": float(np.mean([losses[name] for losses in found if name in losses]))
            for name in names
        }


class Probe:
    """Asks the model the server's own prompts, and says how many steps their answers call for.

    Attributes:
      found: of each time, share refused and its 95% interval, in percent, and prompts asked.
      tokens: generated.
    """

    def __init__(self, server: ConstitutionalStage, clock):
        self.server, self.clock = server, clock
        self.found: list[dict] = []
        self.tokens = 0

    def __call__(self, current, adapter=None) -> int:
        """Steps to go on with; `adapter` (on one device) takes the place of the model's own."""
        if adapter is not None:
            where = jax.tree.map(lambda x: x.sharding, current.factors)
            adapter = jax.block_until_ready(jax.device_put(adapter, where))
            current = current.with_adapter(current.adapter._replace(factors=adapter))
            self.clock.mark("cai_train")
        c, steps, refused = self.server.config.cai, 0, []
        prompts = [e.prompt for e in self.server.probes]
        for start in range(0, len(prompts), PROBED):
            answers = current.generate(
                prompts[start : start + PROBED], max_new_tokens=PROBE_TOKENS, truncate=True
            )
            self.tokens += self.server.tokens(answers)
            refused += [start_refusal(a) for a in answers]
            mean, interval = float(np.mean(refused)), wilson(sum(refused), len(refused))
            steps = schedule.adaptive(100 * mean, 100 * interval[1], c.target, c.steps)
            if steps:
                break
        self.found.append(
            {"refused": 100 * mean, "ci95": [100 * x for x in interval], "asked": len(refused)}
        )
        self.clock.mark("cai_probe")
        return steps


def make_generate_fn(
    max_new_tokens: int, seed, talk: ChatSession, temperature: float, chat_form=True
) -> revise_lib.Generate:
    """How a model answers threads, for `cai.revise`; what is sampled depends on the call.

    Args:
      max_new_tokens: of an answer, critique or revision.
      seed: of the samples.
      talk: with a chat model, or one whose template is `forms.DIALOGUE`.
      temperature: 0 for greedy.
      chat_form: threads become chats of user and assistant.
    """

    def say(threads, call):
        call_seed = int(np.random.default_rng([*seed, call]).integers(2**31))
        return talk.answer_dialogues(
            [forms.as_chat(thread) if chat_form else thread for thread in threads],
            max_new_tokens, temperature, seed=call_seed, truncate=True,
        )  # fmt: skip

    return say


def _some(pool: list[Example], count: int, rng) -> list[Example]:
    return [pool[i] for i in rng.permutation(len(pool))[:count]]
