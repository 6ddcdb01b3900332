"""Trains the package's small instruct model from scratch and saves a Hugging Face folder.

The command is `fedsafe pretrain`.
"""

import json
import pathlib
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from fedsafe_jax import random_streams
from fedsafe_jax.data import chat, packing
from fedsafe_jax.demo.dialogues import Dialogue, build_dialogues, model_card
from fedsafe_jax.inference.language_model import LanguageModel
from fedsafe_jax.inference.pretrained import load_pretrained, save_pretrained
from fedsafe_jax.models import hub
from fedsafe_jax.models.decoder import Decoder
from fedsafe_jax.models.decoder_config import from_hf
from fedsafe_jax.models.loss import token_nll
from fedsafe_jax.random_streams import Purpose

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
SPECIAL = ("<|pad|>", "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, max_length: int
) -> "PreTrainedTokenizerFast":
    """Trains a byte-level BPE tokenizer with the chat template above."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    # Digits apart, so that numbers share tokens in a small vocabulary.
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<|pad|>",
        bos_token="<|begin|>",
        eos_token="<|end|>",
        additional_special_tokens=list(SPECIAL[3:]),
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_rows(
    tokenizer: "PreTrainedTokenizerFast",
    dialogues: list[Dialogue],
    seq: int,
    rng: np.random.Generator,
) -> packing.Batch:
    """Shuffles, encodes and packs all dialogues into rows `[rows, seq]`; longer ones are cut."""
    encoded = [
        chat.encode(tokenizer, d.messages, d.response, seq, d.train_on_turns)
        for d in (dialogues[i] for i in rng.permutation(len(dialogues)))
    ]
    encoded = [e for e in encoded if e is not None]
    # First fit within windows: the order stays random, and packing stays linear in the data.
    parts = [packing.pack(encoded[i : i + 256], seq) for i in range(0, len(encoded), 256)]
    rows = packing.Batch(*(np.concatenate(fields) for fields in zip(*parts, strict=True)))
    order = rng.permutation(len(rows.tokens))
    return packing.Batch(*(field[order] for field in rows))


def new_hf_config(config: ml_collections.ConfigDict, tokenizer: "PreTrainedTokenizerFast") -> dict:
    """Returns the `config.json` of a Llama of the shape that the config asks for."""
    from transformers import LlamaConfig

    llama = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        max_position_embeddings=config.max_length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return llama.to_dict()


def make_step(
    model: Decoder, optimizer: optax.GradientTransformation, prompt_weight: float
) -> Callable:
    """Makes one jitted training step: answers count fully, other tokens by `prompt_weight`.

    Returns:
      `(params, state, batch) -> (params, state, mean negative log-likelihood of the answers)`, in
      which parameters and optimizer state are donated.
    """

    def loss_fn(params, batch: packing.Batch):
        hidden, _ = model.apply(
            {"params": params}, batch.tokens, batch.positions, batch.segment_ids
        )
        shifted = jnp.pad(batch.segment_ids[:, 1:], ((0, 0), (0, 1)))
        inside = (batch.segment_ids > 0) & (shifted == batch.segment_ids)
        weight = jnp.where(inside, jnp.maximum(batch.mask, prompt_weight), 0.0)
        nll = token_nll(model, params, hidden, batch.targets, weight)
        return jnp.sum(nll * weight) / jnp.sum(weight), jnp.sum(nll * batch.mask) / jnp.sum(
            batch.mask
        )

    def step(params, state, batch):
        (_, answer_nll), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, answer_nll

    return jax.jit(step, donate_argnums=(0, 1))


def run(
    config: ml_collections.ConfigDict, output: str, report: Callable[[str], None] = print
) -> None:
    """Builds the data, trains, and saves; what was done goes to `output/stages.json`.

    With `config.init_from`, parameters and tokenizer start from that folder: a further stage.

    Args:
      config: fields of `configs/pretrain_demo.py`.
      output: folder of the model, written every `save_every` steps.
      report: takes a line about the data, and one every 50 steps.
    """
    rng = random_streams.generator(Purpose.PRETRAIN_DATA, config.seed)
    dialogues, counts = build_dialogues(config, rng)
    report(f"data: {json.dumps(counts)}")
    stages = []
    if config.init_from:
        start = load_pretrained(config.init_from)
        tokenizer, params, hf_config = start.tokenizer, start.params, start.hf_config
        stages = json.loads((pathlib.Path(config.init_from) / "stages.json").read_text())
    else:
        sample = [dialogues[i] for i in rng.permutation(len(dialogues))[:40000]]
        texts = ("\n".join([*(t for _, t in d.messages), d.response]) for d in sample)
        tokenizer = train_tokenizer(texts, config.vocab_size, config.max_length)
        hf_config = new_hf_config(config, tokenizer)
        blank = jnp.zeros((1, 8), jnp.int32)
        shape = from_hf(hub.hf_config(hf_config))
        key = random_streams.key(Purpose.PRETRAIN_START, config.seed)
        params = Decoder(shape).init(key, blank, blank, blank)["params"]
    decoder_config = from_hf(hub.hf_config(hf_config), config.compute_dtype)
    rows = build_rows(tokenizer, dialogues, config.seq_len, rng)
    useful = float((rows.segment_ids > 0).mean())
    steps = min(config.steps, len(rows.tokens) // config.rows_per_step)
    report(f"{len(rows.tokens)} rows, {100 * useful:.0f}% useful, {steps} steps")

    model = Decoder(decoder_config)
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, 50, steps, 1e-5)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.05)
    )
    state = optimizer.init(params)
    step_fn = make_step(model, optimizer, config.prompt_weight)
    output = pathlib.Path(output)
    tokens_a_step = config.rows_per_step * config.seq_len
    started, losses = time.monotonic(), []
    for i in range(steps):
        part = slice(i * config.rows_per_step, (i + 1) * config.rows_per_step)
        params, state, nll = step_fn(params, state, packing.Batch(*(f[part] for f in rows)))
        losses.append(nll)
        if (i + 1) % 50 == 0 or i + 1 == steps:
            seconds = time.monotonic() - started
            rate = (i + 1) * tokens_a_step * useful / seconds
            mean = float(np.mean(jax.device_get(losses[-50:])))
            report(f"step {i + 1}/{steps} answer nll {mean:.3f}, {rate:.0f} tokens/s")
        if (i + 1) % config.save_every == 0 or i + 1 == steps:
            done = [*stages, {"steps": i + 1, "tokens_a_step": tokens_a_step, "data": counts}]
            card = model_card(decoder_config, done)
            lm = LanguageModel(decoder_config, params, tokenizer, hf_config=hf_config)
            save_pretrained(lm, output, "bfloat16")
            (output / "README.md").write_text(card)
            hub.write_json(output / "stages.json", done)
