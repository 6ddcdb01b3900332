"""A generative guard as the filter: a language model whose next token is the verdict.

Llama Guard 3 answers `safe` or `unsafe` after a blank line. One forward pass reads the verdict's
probability, no text is generated. Fine-tuning trains that token through a LoRA adapter, since
pairs of one's own carry no hazard categories; a guardian (Kwon et al., 2024) also learns what to
say instead, so that it can write the replacement.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedsafe_jax.data import chat
from fedsafe_jax.data.examples import UNSAFE, Example
from fedsafe_jax.filters import policy, stream, training
from fedsafe_jax.filters.decision import Decision
from fedsafe_jax.filters.protocol import FilterError, labelled
from fedsafe_jax.filters.training import TrainingOptions
from fedsafe_jax.models import lora, loss
from fedsafe_jax.models.decoder import Decoder

SHORTEST = 8  # tokens of request and response each, below which a verdict means nothing
BATCH_TOKENS = 4096  # of a scoring batch
CHARACTERS_A_TOKEN = 24  # nothing longer than so many a token is tokenised


class GuardFilter(NamedTuple):
    """A guard.

    Attributes:
      model, params, adapter: decoder, base, and LoRA factors (None for the guard as it came).
      tokenizer: of the guard.
      max_length: tokens of a row, template included.
      decision: temperature and threshold.
      template: see `render_pairs`.
      guardian: trained to answer as well.
    """

    model: Decoder
    params: dict
    adapter: dict | None
    tokenizer: object
    max_length: int
    decision: Decision = Decision()
    template: str = "own"
    guardian: bool = False

    def log_odds(self, pairs: Sequence[Example]) -> np.ndarray:
        """See `protocol.SafetyFilter`."""
        rows = render_pairs(self.tokenizer, pairs, self.max_length, self.template)
        verdicts = verdict_ids(self.tokenizer)
        return _log_odds(self.model, verdicts, self.params, self.adapter, rows)

    def score(self, pairs: Sequence[Example]) -> np.ndarray:
        """See `protocol.SafetyFilter`."""
        return self.decision.probability(self.log_odds(pairs))


def verdict_ids(tokenizer) -> tuple[int, int]:
    """First token of "safe" and of "unsafe".

    Raises:
      FilterError: the tokenizer gives both the same first token.
    """
    safe, unsafe = (
        tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("safe", "unsafe")
    )
    if safe == unsafe:
        raise FilterError("filter.model: 'safe' and 'unsafe' begin with the same token.")
    return safe, unsafe


def template_of(tokenizer, max_length: int) -> str:
    """`own` where the chat template carries the task (Llama Guard); else `policy` with all
    categories, or `short` where those would fill more than half of a row."""
    if policy.MARKER in (tokenizer.chat_template or ""):
        return "own"
    bare = tokenizer(policy.task("", ""), add_special_tokens=False)["input_ids"]
    return "policy" if 2 * len(bare) <= max_length else "short"


def render_pairs(
    tokenizer, pairs: Sequence[Example], max_length: int, template: str
) -> list[list[int]]:
    """Token ids of each pair in the guard's template, up to where the verdict comes.

    Args:
      tokenizer: of the guard.
      pairs: request and response are each cut to half of what the template leaves.
      max_length: tokens of a row.
      template: `own`, `policy` or `short`, see `template_of`.

    Raises:
      FilterError: the template leaves too little room.
    """
    # Llama Guard 3's first token is a blank line.
    lead = tokenizer("\n\n", add_special_tokens=False)["input_ids"] if template == "own" else []

    def wrap(request, response):
        turns = [("user", request), ("assistant", response)]
        if template != "own":
            turns = [("user", policy.task(request, response, template == "short"))]
        return [*chat.render(tokenizer, turns, add_generation_prompt=True), *lead]

    # Cut texts may re-tokenise to a few tokens more than they were cut to.
    half = (max_length - len(wrap("", ""))) // 2 - 4
    if half < SHORTEST:
        raise FilterError(
            f"filter.max_length={max_length}: the guard's template leaves no room for the pair; "
            f"use at least {max_length + 2 * (SHORTEST - half)}."
        )

    def cut(text, keep):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return text if len(ids) <= half else tokenizer.decode(ids[keep])

    limit, rows = CHARACTERS_A_TOKEN * max_length, []
    for pair in pairs:
        request = cut(pair.prompt[-limit:], slice(-half, None))
        rows.append(wrap(request, cut(pair.response[:limit], slice(half)))[-max_length:])
    return rows


def _stacked(rows, width: int, count: int):
    """`(tokens int32 [count, width], lengths int32 [count])`, empty rows of length 1."""
    lengths = np.ones(count, np.int32)
    lengths[: len(rows)] = [len(r) for r in rows]
    return stream.stack(rows, width, count), lengths


def _last_hidden(model, params, adapter, tokens, lengths):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segments = (positions < lengths[:, None]).astype(jnp.int32)
    variables = {"params": params} | ({} if adapter is None else {"lora": adapter})
    hidden, _ = model.apply(variables, tokens, positions, segments)
    return jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]


@functools.partial(jax.jit, static_argnames=("model", "verdicts"))
def _difference(model, verdicts, params, adapter, tokens, lengths):
    last = _last_hidden(model, params, adapter, tokens, lengths)
    logits = model.apply({"params": params}, last, method="unembed")
    return logits[:, verdicts[1]] - logits[:, verdicts[0]]


def _log_odds(model, verdicts, params, adapter, rows) -> np.ndarray:
    lengths, out = [len(r) for r in rows], np.zeros(len(rows), np.float32)
    waiting = []
    for chosen, width, count in stream.batches(lengths, BATCH_TOKENS):
        batch = _stacked([rows[i] for i in chosen], width, count)
        waiting.append((chosen, _difference(model, verdicts, params, adapter, *batch)))
    for chosen, found in waiting:  # dispatched before any is read
        out[chosen] = np.asarray(found)[: len(chosen)]
    return out


def train(
    examples: Sequence[Example],
    lm,
    lora_config: lora.LoraConfig,
    seed: int,
    options: TrainingOptions | None = None,
    max_length: int = 512,
    replies: Sequence[str] | None = None,
) -> tuple[GuardFilter, training.Trained]:
    """Fine-tunes a guard, or a guardian, with AdamW; classes weighted to balance.

    Args:
      examples: pairs labelled safe or unsafe; both must occur.
      lm: `LanguageModel` of the guard.
      lora_config: shape of the guard's own adapter.
      seed: of initialisation and order.
      options: see `training.TrainingOptions`.
      max_length: tokens of a row, template included.
      replies: safe answers to each example's request, "" where there is none: what a guardian
        learns to say behind the verdict. None for a guard.

    Raises:
      FilterError: one of the labels is missing, or the template leaves no room.
    """
    pairs, unsafe = labelled(examples)
    tokenizer, verdicts = lm.tokenizer, verdict_ids(lm.tokenizer)
    template = template_of(tokenizer, max_length)
    rows = render_pairs(tokenizer, pairs, max_length, template)
    model = Decoder(lm.config, lora_config.scale)
    adapter = lora.init(jax.random.key(seed), lm.config, lora_config)
    tails = [[verdicts[u]] for u in unsafe]
    if replies is not None:
        known = [r for e, r in zip(examples, replies, strict=True) if e.label in ("safe", "unsafe")]
        ends = [*tokenizer("\n", add_special_tokens=False)["input_ids"]], tokenizer.eos_token_id
        for tail, reply in zip(tails, known, strict=True):
            if reply:
                words = tokenizer(reply, add_special_tokens=False)["input_ids"]
                tail += [*ends[0], *words[: max_length // 2], ends[1]]
    whole = [[*row, *tail] for row, tail in zip(rows, tails, strict=True)]

    def arrays(chosen, width, count):
        tokens, lengths = _stacked([whole[i] for i in chosen], width, count)
        starts = np.full(count, width, np.int32)
        starts[: len(chosen)] = [len(rows[i]) for i in chosen]
        return tokens, lengths, starts

    def loss_fn(adapter, base, batch, target, weight, key):
        del target, key
        tokens, lengths, starts = batch
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        segments = (positions < lengths[:, None]).astype(jnp.int32)
        hidden, _ = model.apply({"params": base, "lora": adapter}, tokens, positions, segments)
        targets = jnp.roll(tokens, -1, axis=1)
        verdict = positions == starts[:, None] - 1
        reply = (positions >= starts[:, None]) & (positions < lengths[:, None] - 1)
        nll = loss.token_nll(model, base, hidden, targets, verdict | reply)
        detected = jnp.sum(jnp.sum(nll * verdict, axis=1) * weight) / jnp.sum(weight)
        return detected + jnp.sum(nll * reply) / jnp.maximum(jnp.sum(reply), 1)

    trained = training.train(
        pairs,
        adapter,
        [len(r) for r in whole],
        arrays=arrays,
        loss_fn=loss_fn,
        log_odds=lambda adapter, chosen: _log_odds(
            model, verdicts, lm.params, adapter, [rows[i] for i in chosen]
        ),
        options=(options or TrainingOptions(batch_size=16, learning_rate=5e-5))._replace(
            weight_decay=0.0
        ),
        seed=seed,
        frozen=lm.params,
    )
    found = GuardFilter(
        model,
        lm.params,
        trained.params,
        tokenizer=tokenizer,
        max_length=max_length,
        decision=trained.decision,
        template=template,
        guardian=replies is not None,
    )
    return found, trained


def safe_replies(examples: Sequence[Example], refusal: str) -> list[str]:
    """What a guardian learns to say: a safe pair's own answer; for an unsafe one another pair's
    safe answer to the same request, or the refusal."""
    safe = {e.prompt: e.response for e in examples if e.label != UNSAFE and e.response}
    return [safe.get(e.prompt, refusal) for e in examples]
