"""A generative guard as the filter: a language model whose next token is the verdict.

Llama Guard 3 answers `safe` or `unsafe` after a blank line. One forward pass reads the verdict's
probability, no text is generated; fine-tuning trains that one token through a LoRA adapter, since
pairs of one's own carry no hazard categories.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedsafe_jax.data import chat
from fedsafe_jax.data.sources import SAFE, UNSAFE, Example
from fedsafe_jax.filters.classifier import FilterError
from fedsafe_jax.models import lora
from fedsafe_jax.models.decoder import Decoder

SHORTEST = 8  # tokens of request and response each, below which a verdict means nothing


class Guard(NamedTuple):
    """A fine-tuned guard; the tokens are those of the two verdicts."""

    model: Decoder
    params: dict
    adapter: dict
    tokenizer: object
    verdicts: tuple[int, int]  # (safe, unsafe)
    max_length: int


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


def encode_pairs(tokenizer, examples: Sequence[Example], max_length: int, lead: str = "\n\n"):
    """The guard's own template around each pair, up to where the verdict comes.

    Args:
      tokenizer: of the guard; its chat template holds the policy.
      examples: pairs; request and response are each cut to half of what the template leaves.
      max_length: tokens of a row.
      lead: what the guard writes before its verdict; Llama Guard 3's first token is a blank line.

    Returns:
      `(tokens int32 [n, max_length], lengths int32 [n])`.

    Raises:
      FilterError: the template leaves too little room.
    """
    lead_ids = tokenizer(lead, add_special_tokens=False)["input_ids"] if lead else []

    def wrap(request, response):
        turns = (("user", request), ("assistant", response))
        return [*chat.render(tokenizer, turns, answer_next=True), *lead_ids]

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

    tokens = np.zeros((len(examples), max_length), np.int32)
    lengths = np.zeros(len(examples), np.int32)
    for i, example in enumerate(examples):
        request = cut(example.prompt, slice(-half, None))
        ids = wrap(request, cut(example.response, slice(half)))[-max_length:]
        tokens[i, : len(ids)] = ids
        lengths[i] = len(ids)
    return tokens, lengths


def _verdict_logits(model, params, adapter, tokens, lengths):
    """Logits of the token after each row's end, `[batch, vocab]` float32."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segments = (positions < lengths[:, None]).astype(jnp.int32)
    variables = {"params": params, "lora": adapter}
    hidden, _ = model.apply(variables, tokens, positions, segments)
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
    return model.apply({"params": params}, last, method="unembed")


def train(
    examples: Sequence[Example],
    lm,
    lora_config: lora.LoraConfig,
    seed: int,
    epochs: int = 5,
    batch_size: int = 16,
    learning_rate: float = 5e-5,
    max_length: int = 512,
) -> Guard:
    """Fine-tunes the verdict token with AdamW, classes weighted to balance.

    Args:
      examples: pairs labelled safe or unsafe; both must occur.
      lm: `LanguageModel` of the guard.
      lora_config: shape of the guard's own adapter.
      seed: of initialisation and order.
      epochs: passes over the data (the paper uses 5).
      batch_size: pairs a step.
      learning_rate: peak of a linear decay.
      max_length: tokens of a row, template included.

    Raises:
      FilterError: one of the labels is missing, or the template leaves no room.
    """
    labelled = [e for e in examples if e.label in (SAFE, UNSAFE)]
    unsafe = np.array([e.label == UNSAFE for e in labelled], np.int32)
    if len(set(unsafe.tolist())) < 2:
        raise FilterError("filter data: needs both safe and unsafe pairs; one of them is missing.")
    verdicts = verdict_ids(lm.tokenizer)
    tokens, lengths = encode_pairs(lm.tokenizer, labelled, max_length)
    targets = np.asarray(verdicts, np.int32)[unsafe]
    balance = (len(unsafe) / (2 * np.bincount(unsafe))).astype(np.float32)[unsafe]
    model = Decoder(lm.config, lora_config.scale)
    adapter = lora.init(jax.random.key(seed), lm.config, lora_config)
    steps_per_epoch = -(-len(labelled) // batch_size)
    schedule = optax.linear_schedule(learning_rate, 0.0, epochs * steps_per_epoch)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.0))
    state = optimizer.init(adapter)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(adapter, state, params, tokens, lengths, target, weight):
        def loss_fn(adapter):
            logits = _verdict_logits(model, params, adapter, tokens, lengths)
            nll = optax.softmax_cross_entropy_with_integer_labels(logits, target)
            return jnp.sum(nll * weight) / jnp.sum(weight)

        updates, state = optimizer.update(jax.grad(loss_fn)(adapter), state, adapter)
        return optax.apply_updates(adapter, updates), state

    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(labelled))
        for number in range(steps_per_epoch):
            # The last batch is filled up from its own start.
            chosen = np.resize(order[number * batch_size : (number + 1) * batch_size], batch_size)
            batch = (tokens[chosen], lengths[chosen], targets[chosen], balance[chosen])
            adapter, state = step(adapter, state, lm.params, *batch)
    return Guard(model, lm.params, adapter, lm.tokenizer, verdicts, max_length)


@functools.partial(jax.jit, static_argnames=("model", "verdicts"))
def _probability(model, verdicts, params, adapter, tokens, lengths):
    logits = _verdict_logits(model, params, adapter, tokens, lengths)
    return jax.nn.softmax(logits[:, jnp.asarray(verdicts)])[:, 1]


def unsafe_probability(guard: Guard, examples: Sequence[Example], batch_size: int = 16):
    """Probability of "unsafe" against "safe" for each pair, float32 `[n]`."""
    model, params, adapter, tokenizer, verdicts, max_length = guard
    tokens, lengths = encode_pairs(tokenizer, examples, max_length)
    out = []
    for start in range(0, len(examples), batch_size):
        rows = np.resize(np.arange(start, min(start + batch_size, len(examples))), batch_size)
        found = _probability(model, verdicts, params, adapter, tokens[rows], lengths[rows])
        out.append(np.asarray(found)[: len(examples) - start])
    return np.concatenate(out) if out else np.zeros(0, np.float32)
