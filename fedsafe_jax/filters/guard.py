"""Generative guard as the filter: a language model whose next token is the verdict.

Llama Guard 3 answers `safe` or `unsafe` after a blank line. One forward pass reads the verdict's
probability; no text is generated. Fine-tuning trains that token alone, through a LoRA adapter,
since the training pairs carry no hazard categories. A guardian (Kwon et al., 2024) also learns what
to say instead, so that it can write the replacement.
"""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from fedsafe_jax import random_streams
from fedsafe_jax.data.examples import SAFE, UNSAFE, Example
from fedsafe_jax.filters import stream, training
from fedsafe_jax.filters.classifier_file import pair_length
from fedsafe_jax.filters.decision import Decision
from fedsafe_jax.filters.guard_prompts import render_pairs, template_of, verdict_ids
from fedsafe_jax.filters.protocol import FilterError, labelled
from fedsafe_jax.filters.training import TrainingOptions
from fedsafe_jax.models import lora, loss
from fedsafe_jax.models.decoder import Decoder
from fedsafe_jax.models.decoder_config import DecoderConfig
from fedsafe_jax.random_streams import Purpose

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_TOKENS = 4096  # tokens of a scoring batch, padding included


class GuardBase(Protocol):
    """What a guard needs of its base model; `inference.LanguageModel` has it.

    Attributes:
      config: shape of the decoder.
      params: base parameters.
      tokenizer: Hugging Face tokenizer with a chat template.
      name: path or Hub id that the model was loaded from.
    """

    config: DecoderConfig
    params: dict
    tokenizer: "PreTrainedTokenizerBase"
    name: str


class GuardFilter(NamedTuple):
    """A guard.

    Attributes:
      model: decoder.
      params: base parameters; None after `unload`.
      adapter: adapter that fine-tuning trained; None for the guard as it came.
      tokenizer: Hugging Face tokenizer of the guard.
      max_length: most tokens of a row, template included.
      decision: calibration and threshold.
      template: see `guard_prompts.render_pairs`.
      guardian: whether it was trained to answer as well.
    """

    model: Decoder
    params: dict | None
    adapter: lora.Adapter | None
    tokenizer: "PreTrainedTokenizerBase"
    max_length: int
    decision: Decision = Decision()
    template: str = "own"
    guardian: bool = False

    @property
    def kind(self) -> str:
        """Name in `kinds.FILTER_KINDS`."""
        return "guardian" if self.guardian else "guard"

    @property
    def factors(self) -> dict | None:
        """The LoRA factors of the adapter; None for the guard as it came."""
        return None if self.adapter is None else self.adapter.factors

    def log_odds(self, pairs: Sequence[Example]) -> np.ndarray:
        """See `protocol.SafetyFilter`."""
        rows = render_pairs(self.tokenizer, pairs, self.max_length, self.template)
        verdicts = verdict_ids(self.tokenizer)
        return _log_odds(self.model, verdicts, self.params, factors=self.factors, rows=rows)

    def score(self, pairs: Sequence[Example]) -> np.ndarray:
        """See `protocol.SafetyFilter`."""
        return self.decision.probability(self.log_odds(pairs))


class RowBatch(NamedTuple):
    """A padded batch of rows.

    Attributes:
      tokens: int32 `[rows, width]`.
      lengths: int32 `[rows]`, 1 for empty rows.
    """

    tokens: np.ndarray
    lengths: np.ndarray


def _stacked(rows: Sequence[Sequence[int]], width: int, count: int) -> RowBatch:
    """A batch of `count` rows; rows past the last one are empty."""
    lengths = np.ones(count, np.int32)
    lengths[: len(rows)] = [len(r) for r in rows]
    return RowBatch(stream.stack(rows, width, count), lengths)


def _hidden(
    model: Decoder, params: dict, factors: dict | None, batch: RowBatch
) -> tuple[jax.Array, jax.Array]:
    """`(hidden states [rows, width, hidden], positions int32 [rows, width])`."""
    positions = jnp.broadcast_to(jnp.arange(batch.tokens.shape[1]), batch.tokens.shape)
    segments = (positions < batch.lengths[:, None]).astype(jnp.int32)
    variables = {"params": params} | ({} if factors is None else {"lora": factors})
    hidden, _ = model.apply(variables, batch.tokens, positions, segments)
    return hidden, positions


@functools.partial(jax.jit, static_argnames=("model", "verdicts"))
def verdict_log_odds(
    model: Decoder,
    verdicts: tuple[int, int],
    params: dict,
    factors: dict | None,
    batch: RowBatch,
) -> jax.Array:
    """Returns the log-odds of "unsafe" against "safe" after each row, float32 `[rows]`."""
    hidden, _ = _hidden(model, params, factors, batch)
    last = jnp.take_along_axis(hidden, batch.lengths[:, None, None] - 1, axis=1)[:, 0]
    logits = model.apply({"params": params}, last, method="unembed")
    return logits[:, verdicts[1]] - logits[:, verdicts[0]]


def _log_odds(
    model: Decoder,
    verdicts: tuple[int, int],
    params: dict,
    factors: dict | None,
    rows: Sequence[Sequence[int]],
) -> np.ndarray:
    """Log-odds of rendered pairs, float32 `[n]`; all batches are dispatched before any is read."""
    lengths, out = [len(r) for r in rows], np.zeros(len(rows), np.float32)
    waiting = []
    for chosen, width, count in stream.batches(lengths, BATCH_TOKENS):
        batch = _stacked([rows[i] for i in chosen], width, count)
        scores = verdict_log_odds(model, verdicts, params, factors=factors, batch=batch)
        waiting.append((chosen, scores))
    for chosen, scores in waiting:
        out[chosen] = np.asarray(scores)[: len(chosen)]
    return out


def train(
    examples: Sequence[Example],
    base: GuardBase,
    lora_config: lora.LoraConfig,
    seed: int,
    options: TrainingOptions | None = None,
    max_length: int = 512,
    replies: Sequence[str] | None = None,
) -> tuple[GuardFilter, training.Trained]:
    """Fine-tunes a guard, or a guardian, with AdamW; classes weighted to balance.

    Args:
      examples: pairs labelled safe or unsafe; both must occur.
      base: language model of the guard.
      lora_config: shape of the guard's own adapter.
      seed: seed of initialisation and order.
      options: see `training.TrainingOptions`; its weight decay is not used.
      max_length: most tokens of a row, template included.
      replies: safe answer to each example's request, "" where there is none: what a guardian
        learns to say behind the verdict. None for a guard.

    Raises:
      FilterError: one of the labels is missing, or the template leaves no room.
    """
    pairs, unsafe = labelled(examples)
    tokenizer, verdicts = base.tokenizer, verdict_ids(base.tokenizer)
    template = template_of(tokenizer, max_length)
    rows = render_pairs(tokenizer, pairs, max_length, template)
    model = Decoder(base.config, lora_config.scale)
    factors = lora.init(random_streams.key(Purpose.FILTER_START, seed), base.config, lora_config)
    tails = [[verdicts[u]] for u in unsafe]
    if replies is not None:
        known = [r for e, r in zip(examples, replies, strict=True) if e.label in (SAFE, UNSAFE)]
        tails = _with_replies(tokenizer, tails, known, max_length // 2)
    whole = [[*row, *tail] for row, tail in zip(rows, tails, strict=True)]

    def make_batch(chosen, width, count):
        starts = np.full(count, width, np.int32)  # index of the verdict
        starts[: len(chosen)] = [len(rows[i]) for i in chosen]
        return _stacked([whole[i] for i in chosen], width, count), starts

    network = training.Network(
        [len(r) for r in whole],
        make_batch=make_batch,
        loss_fn=functools.partial(verdict_loss, model),
        log_odds=lambda factors, chosen: _log_odds(
            model, verdicts, base.params, factors=factors, rows=[rows[i] for i in chosen]
        ),
        frozen=base.params,
    )
    options = options or TrainingOptions(batch_size=16, learning_rate=5e-5)
    trained = training.train(pairs, factors, network, options._replace(weight_decay=0.0), seed)
    guard = GuardFilter(
        model,
        base.params,
        lora.Adapter(trained.params, lora_config, base.name),
        tokenizer=tokenizer,
        max_length=max_length,
        decision=trained.decision,
        template=template,
        guardian=replies is not None,
    )
    return guard, trained


def _with_replies(
    tokenizer: "PreTrainedTokenizerBase",
    tails: Sequence[list[int]],
    replies: Sequence[str],
    most: int,
) -> list[list[int]]:
    """Verdicts, each followed by a line break, at most `most` tokens of its reply, and the end."""
    line_break = tokenizer("\n", add_special_tokens=False)["input_ids"]
    longer = []
    for tail, reply in zip(tails, replies, strict=True):
        if reply:
            words = tokenizer(reply, add_special_tokens=False)["input_ids"]
            tail = [*tail, *line_break, *words[:most], tokenizer.eos_token_id]
        longer.append(tail)
    return longer


def verdict_loss(
    model: Decoder,
    factors: dict,
    base: dict,
    batch: tuple[RowBatch, np.ndarray],
    target: jax.Array,
    weight: jax.Array,
    key: jax.Array,
) -> jax.Array:
    """Returns the weighted loss of the verdict, plus the mean loss of a guardian's answer."""
    del target, key
    rows, starts = batch
    hidden, positions = _hidden(model, base, factors, rows)
    targets = jnp.roll(rows.tokens, -1, axis=1)
    verdict = positions == starts[:, None] - 1
    reply = (positions >= starts[:, None]) & (positions < rows.lengths[:, None] - 1)
    nll = loss.token_nll(model, base, hidden, targets, verdict | reply)
    detected = jnp.sum(jnp.sum(nll * verdict, axis=1) * weight) / jnp.sum(weight)
    return detected + jnp.sum(nll * reply) / jnp.maximum(jnp.sum(reply), 1)


def safe_replies(
    examples: Sequence[Example], refusal: str, answered: Sequence[Example] | None = None
) -> list[str]:
    """Returns what a guardian learns to say to each example's request.

    A safe answer to it: of a safe pair its own, of an unsafe pair another one's to the same
    request; the refusal where there is none.

    Args:
      examples: what it is trained on.
      refusal: answer to requests without a safe one.
      answered: pairs that the answers are taken from; None for the examples.
    """
    pairs = examples if answered is None else answered
    safe = {e.messages: e.response for e in pairs if e.label != UNSAFE and e.response}
    return [safe.get(e.messages, refusal) for e in examples]


def save(guard: GuardFilter, folder: pathlib.Path) -> dict:
    """Writes the adapter; returns the guard's fields of `filter.json`."""
    lora.save_adapter(guard.adapter, folder)
    return {"template": guard.template, "base_model": guard.adapter.base_model}


def unload(guard: GuardFilter) -> GuardFilter:
    """Returns a guard without its base parameters, which are freed with the guard given."""
    return guard._replace(params=None)


def reload(guard: GuardFilter, load_model: Callable[[str], GuardBase]) -> GuardFilter:
    """Returns a guard that `unload` returned with its base parameters, read again.

    Args:
      guard: the guard.
      load_model: loads a language model by path or Hub id.
    """
    return guard._replace(params=load_model(guard.adapter.base_model).params)


def load(
    folder: pathlib.Path,
    content: dict,
    decision: Decision,
    load_model: Callable[[str], GuardBase],
    guardian: bool = False,
) -> GuardFilter:
    """Reads what `save` wrote.

    Args:
      folder: folder of the filter.
      content: the content of `filter.json`.
      decision: calibration and threshold.
      load_model: loads a language model by path or Hub id.
      guardian: whether the guard was trained to answer as well.
    """
    where = folder / "filter.json"
    name, template = content["base_model"], content["template"]
    if not isinstance(name, str) or not name or template not in ("own", "policy", "short"):
        raise FilterError(
            f"{where}: base_model and template are not what training writes; train it again."
        )
    # A folder that came from elsewhere decides what is read here: that is not done without a word.
    logging.info("%s: its base model '%s' is read, which filter.json names", folder, name[:200])
    # `reload` reads the same base again, whatever adapter_config.json says.
    adapter, base = lora.load_adapter(folder)._replace(base_model=name), load_model(name)
    lora.check_base(adapter, base.config)
    return GuardFilter(
        Decoder(base.config, adapter.config.scale),
        base.params,
        adapter,
        tokenizer=base.tokenizer,
        max_length=pair_length(content["max_length"], where),
        decision=decision,
        template=template,
        guardian=guardian,
    )
