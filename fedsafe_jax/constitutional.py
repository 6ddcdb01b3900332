"""Light CAI on the aggregated model: generate, criticise, revise, then SFT and DPO."""

import jax.numpy as jnp
import numpy as np

from fedsafe_jax.cai import revise as revise_lib
from fedsafe_jax.cai import train as cai_train
from fedsafe_jax.data import chat
from fedsafe_jax.evals.judges import start_refusal
from fedsafe_jax.rounds import rate


def decay(config, t: int) -> float:
    """The clients' rate as a share of its start. CAI follows it: at a constant rate its last
    rounds outweigh what the clients still learn, and over-refusal grows."""
    return rate(config, t) / config.learning_rate


def run(config, world, cai_fn, current, base, seed: int, t: int, clock):
    """One round of CAI.

    Args:
      config, world: of the run.
      cai_fn: from `cai.train.make_train`.
      current, base: the global model, and the model without an adapter.
      seed, t: what is drawn depends on nothing else.
      clock: has a `lap`.

    Returns:
      `(new adapter, counts for the metrics, records)`.
    """
    c = config.cai
    rng = np.random.default_rng([seed, t, 2])

    def some(pool, count):
        return [pool[i] for i in rng.permutation(len(pool))[:count]]

    harmful = [e.prompt for e in some(world.red_team, c.red_team_prompts)]
    benign = [e.prompt for e in some(world.replay, c.benign_prompts)]
    reviser = current if c.reviser == "global" else base

    def answering(lm, temperature):
        def generate(threads, call):
            call_seed = int(np.random.default_rng([seed, t, 3, call]).integers(2**31))
            return lm.answer_dialogues(
                threads, c.max_new_tokens, temperature, seed=call_seed, batch_size=32, cut=True
            )

        return generate

    found = revise_lib.revise(
        harmful + benign,
        world.principles,
        answering(current, c.temperature),
        answering(reviser, 0.0),
        (seed, t, 4),
        wanted=[True] * len(harmful) + [False] * len(benign),
        refuses=start_refusal,
    )
    clock.lap("cai_generate")
    counts: dict[str, int] = {"kept": 0}
    for record in found:
        counts[record.dropped or "kept"] = counts.get(record.dropped or "kept", 0) + 1
    kept = [r for r in found if not r.dropped]
    tokenizer = world.lm.tokenizer

    def encode(prompt, response):
        return chat.encode(tokenizer, (("user", prompt),), response, config.seq_len)

    replay = some(world.replay, c.replay_examples)
    sft = [encode(r.prompt, r.revision) for r in kept] + [
        chat.encode(tokenizer, e.messages, e.response, config.seq_len) for e in replay
    ]
    pairs = [
        (encode(r.prompt, r.revision), encode(r.prompt, r.initial)) for r in kept if r.preferred
    ]
    sft = [e for e in sft if e is not None]
    pairs = [(a, b) for a, b in pairs if a is not None and b is not None]
    batches = cai_train.make_batches(
        sft, pairs, c.steps, c.batch_size, c.pairs_per_step, config.seq_len, (seed, t, 5)
    )
    local = current.on_one_device()
    adapter, sft_losses, dpo_losses = cai_fn(
        local.adapter,
        local.params,
        batches,
        jnp.float32(c.learning_rate * decay(config, t)),
    )
    counts |= {
        "pairs": len(pairs),
        "replay": len(replay),
        "sft_loss": float(sft_losses.mean()),
        "dpo_loss": float(dpo_losses.mean()),
    }
    clock.lap("cai_train")
    return adapter, counts, found
