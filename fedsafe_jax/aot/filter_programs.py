"""Programs of the safety filter: a training step and the scoring of a batch."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fedsafe_jax import random_streams
from fedsafe_jax.aot.program import (
    Program,
    Run,
    base_shapes,
    decoder_config,
    least,
    on,
)
from fedsafe_jax.data.packing import round_up
from fedsafe_jax.filters import classifier, guard, training
from fedsafe_jax.filters.kinds import FILTER_KINDS
from fedsafe_jax.models import attention, encoder_hub, lora
from fedsafe_jax.models.decoder import Decoder
from fedsafe_jax.models.encoder import Classifier, EncoderConfig
from fedsafe_jax.models.sharding import platform_of
from fedsafe_jax.random_streams import Purpose


def filters(run: Run) -> Iterator[Program]:
    """Yields what the config's kind of filter compiles; nothing for one that is not a model."""
    kind = FILTER_KINDS[run.config.filter.kind]
    if kind.make is None:
        return
    yield from _guard(run) if kind.needs_model else _classifier(run)


def _widths(run: Run) -> tuple[int, int, int, float]:
    """Returns rows and width of a training batch, its tokens, and the mean of those they see."""
    c = run.config.filter
    whole = np.minimum(run.lengths.prompts + run.lengths.responses, c.max_length)
    whole = whole[np.arange(c.batch_size) % len(whole)]
    seen = float((whole * (whole + 1)).sum() / (2 * whole.sum()))
    return c.batch_size, round_up(int(whole.max())), int(whole.sum()), seen


def _options(run: Run, **changes: float) -> training.TrainingOptions:
    c = run.config.filter
    return training.TrainingOptions(
        epochs=c.epochs, batch_size=c.batch_size, learning_rate=c.learning_rate
    )._replace(**changes)


def _guard(run: Run) -> Iterator[Program]:
    c, mesh = run.config, run.copy
    shape = decoder_config(c.filter.model or c.model, c, mesh)
    shape_of = lora.LoraConfig(
        c.filter.lora_rank, 2.0 * c.filter.lora_rank, lora.expand_targets(c.lora_targets)
    )
    base, model = base_shapes(shape, c), Decoder(shape, shape_of.scale)
    factors = jax.eval_shape(
        lambda: lora.init(random_streams.key(Purpose.SHAPES, 0), shape, shape_of)
    )
    rows, width, tokens, seen = _widths(run)
    batch = guard.RowBatch(np.zeros((rows, width), np.int32), np.zeros(rows, np.int32))
    data = (batch, np.zeros(rows, np.int32)), np.zeros(rows, np.int32), np.zeros(rows, np.float32)
    optimizer = training.make_optimizer(_options(run, weight_decay=0.0), 1)
    step = training.make_step(functools.partial(guard.verdict_loss, model), optimizer)
    laid, data = on(factors, mesh), on(data, mesh)
    state = on(jax.eval_shape(optimizer.init, factors), mesh)
    key = on(jax.eval_shape(lambda: random_streams.key(Purpose.SHAPES, 0)), mesh)
    backend = attention.choose_backend(shape, width, width)
    yield Program(
        "filter_train",
        step,
        (laid, state, base, data, key),
        kinds={"base": base, "adapters": laid, "optimizer": state, "batch": data},
        mesh=mesh,
        tokens=tokens,
        computed=rows * width,
        minimum=least(shape, tokens, seen, logits=2 * rows, trains=True, remat=c.remat),
        attention=backend,
    )
    count = max(guard.BATCH_TOKENS // width, 1)
    batch = guard.RowBatch(np.zeros((count, width), np.int32), np.zeros(count, np.int32))
    batch, scored = on(batch, mesh), round(tokens * count / rows)
    yield Program(
        "filter_score",
        guard.verdict_log_odds,
        (model, (0, 1), base, laid, batch),
        kinds={"base": base, "adapters": laid, "batch": batch},
        mesh=mesh,
        tokens=scored,
        computed=count * width,
        minimum=least(shape, scored, seen, logits=count),
        attention=backend,
    )


def _classifier(run: Run) -> Iterator[Program]:
    c, mesh = run.config.filter, run.first
    config = _encoder_config(run, mesh)
    model = Classifier(config)
    rows, width, tokens, _ = _widths(run)
    width = min(width, config.max_length)

    def batch_of(count: int) -> classifier.PairBatch:
        empty = np.zeros((count, width), np.int32)
        return classifier.PairBatch(empty, empty, empty.astype(bool))

    params = jax.eval_shape(
        lambda: model.init(random_streams.key(Purpose.SHAPES, 0), *map(jnp.asarray, batch_of(1)))[
            "params"
        ]
    )
    weights = sum(math.prod(x.shape) for x in jax.tree.leaves(params) if len(x.shape) > 1)
    weights -= config.vocab_size * config.hidden_size  # a lookup, not a product
    scores = 4 * config.num_layers * config.hidden_size * tokens / rows
    params = on(params, mesh)
    if not c.unsafe_labels:  # else the encoder is used as it is
        optimizer = training.make_optimizer(_options(run), 1)
        step = training.make_step(functools.partial(classifier.weighted_loss, model), optimizer)
        state = on(jax.eval_shape(optimizer.init, params), mesh)
        data = batch_of(rows), np.zeros(rows, np.int32), np.zeros(rows, np.float32)
        data = on(data, mesh)
        yield Program(
            "filter_train",
            step,
            (
                params,
                state,
                (),
                data,
                on(jax.eval_shape(lambda: random_streams.key(Purpose.SHAPES, 0)), mesh),
            ),
            kinds={"base": params, "optimizer": state, "batch": data},
            mesh=mesh,
            tokens=tokens,
            computed=rows * width,
            minimum=3 * tokens * (2 * weights + scores),
        )
    count = max(classifier.BATCH_TOKENS // width, 1)
    batch = on(batch_of(count), mesh)
    scored = round(tokens * count / rows)
    yield Program(
        "filter_score",
        classifier.batch_log_odds,
        (config, (1,), params, batch),
        kinds={"base": params, "batch": batch},
        mesh=mesh,
        tokens=scored,
        computed=count * width,
        minimum=scored * (2 * weights + scores),
    )


def _encoder_config(run: Run, mesh: Mesh) -> EncoderConfig:
    c = run.config.filter
    if not c.encoder:
        return EncoderConfig(
            run.shape.vocab_size, max_length=c.max_length, platform=platform_of(mesh)
        )
    _, shape = encoder_hub.read_config(pathlib.Path(c.encoder))
    labels = shape.num_labels if c.unsafe_labels else 2
    return dataclasses.replace(shape, num_labels=labels, platform=platform_of(mesh))
