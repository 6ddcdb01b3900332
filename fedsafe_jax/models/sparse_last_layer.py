"""Loss of packed rows, with the last layer computed for target tokens alone.

For prompt and padding tokens only the last layer's keys and values are needed; its queries, MLP
and logits are not. On the Dolly data set that is five tokens
in six. The number of target tokens is data, so target tokens are taken in chunks of a fixed size,
only the chunks that they fill are computed, and a chunk's gradient is computed with its loss.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import custom_vjp_primal_tree_values

from fedsafe_jax.models import attention, rotary
from fedsafe_jax.models.decoder import Decoder, target_nll
from fedsafe_jax.models.decoder_layer import Layer, RMSNorm, layer_kinds
from fedsafe_jax.models.dropout import Dropout, of_noise
from fedsafe_jax.models.flatten_vmap import TARGET_CHUNKS
from fedsafe_jax.models.rotary import Rotation
from fedsafe_jax.models.visibility import Visibility

CHUNK_TOKENS = 128  # Each chunk computes the keys and values of all tokens again.


class _Row(NamedTuple):
    """All rows end to end as one, in which the segments of different rows stay apart.

    Attributes:
      rotation: rotary positions, `[tables, 1, tokens, 1, head_dim/2]`.
      batch: `data.packing.Batch` with fields `[1, tokens]`.
      weights: float32 `[1, tokens]`, zero on tokens without a loss.
    """

    rotation: Rotation
    batch: Any
    weights: jax.Array


def weighted_nll(
    model: Decoder, factors: dict, base: dict, batch: Any, weights: jax.Array
) -> jax.Array:
    """Returns the sum over tokens of `weights` times their negative log-likelihood, in nats.

    Args:
      model: the decoder.
      factors: LoRA factors.
      base: base parameters, frozen.
      batch: `data.packing.Batch` with fields `[rows, seq]`. Few tokens in all: the last layer's
        attention scores are dense, `[chunk, rows * seq]`.
      weights: float32 `[rows, seq]`, zero on tokens without a loss.

    Returns:
      float32 scalar.

    Raises:
      TypeError: the gradient with respect to the base is asked for.
    """
    rotation = rotary.rotation(model.config, batch.positions)
    states = _before_last_layer(model, factors, base, batch, rotation)
    last_factors = jax.tree.map(lambda x: x[-1], factors["layers"])
    rows, seq = batch.mask.shape
    # Segment ids are at most `seq`, so this offset makes those of different rows different.
    unique_ids = batch.segment_ids + (seq + 1) * jnp.arange(rows)[:, None]
    batch = batch._replace(segment_ids=unique_ids)
    batch, weights = jax.tree.map(lambda x: jnp.reshape(x, (1, -1)), (batch, weights))
    rotation = Rotation(*(r.reshape(len(r), 1, rows * seq, *r.shape[3:]) for r in rotation))
    loss = _last_layer_nll(model, min(CHUNK_TOKENS, rows * seq))
    states = states.reshape(1, rows * seq, -1)
    return loss(last_factors, states, base, _Row(rotation, batch, weights))


def _before_last_layer(model: Decoder, factors, base, batch, rotation: Rotation):
    """Computes the last layer's input, `[rows, seq, hidden_size]`; arguments of `weighted_nll`."""
    config = model.config
    visibility = Visibility.in_rows(batch.segment_ids)
    masks_or_segments = attention.attention_inputs(config, visibility)
    layer_fn = Layer(config, model.lora_scale, parent=None)
    drop = _dropout(model, batch)

    def layer_step(states, inputs):
        kind, lora = inputs
        # Indexed, because scanning over a slice of all but the last would copy the base.
        params = jax.tree.map(
            lambda p: jax.lax.dynamic_index_in_dim(p, kind.index, keepdims=False), base["layers"]
        )
        variables = {"params": params, "lora": lora}
        (states, _), _ = layer_fn.apply(
            variables, (states, None), kind, rotation, masks_or_segments, dropout=drop
        )
        return states, None

    def is_saved(primitive, *_, **params):
        # The layer's weights are read again from the base; all other residuals are saved.
        return primitive.name not in ("dynamic_slice", "squeeze")

    layer_step = jax.checkpoint(
        layer_step, prevent_cse=False, policy=None if config.remat else is_saved
    )
    inputs = layer_kinds(config), factors["layers"]
    inputs = jax.tree.map(lambda x: jnp.asarray(x[: config.num_layers - 1]), inputs)
    states = model.apply({"params": base}, batch.tokens, method="embed")
    return jax.lax.scan(layer_step, states, inputs)[0]


def _dropout(model: Decoder, batch) -> Dropout | None:
    """Returns the dropout of a batch's tokens; None where the batch has no noise."""
    return of_noise(getattr(batch, "noise", None), model.lora_dropout)


# Cached, so that a model and chunk size have one function, whose traces jax can reuse.
@functools.lru_cache(maxsize=16)
def _last_layer_nll(model: Decoder, chunk: int) -> Callable:
    """Returns the differentiable loss of the last layer's input.

    Returns:
      `(factors, states, base, row) -> weighted_nll`, float32 scalar: `factors` of the last layer,
      `{"self_attn": {"q_proj": {"a": [in, rank], ...}}}`, `states` `[1, tokens, hidden_size]`,
      `base` with stacked layers, `row` a `_Row`.
    """
    chunk_nll = functools.partial(_chunk_nll, model)
    nll = jax.custom_vjp(functools.partial(_last_layer_value, chunk_nll, chunk))
    forward = functools.partial(_last_layer_forward, chunk_nll, chunk)
    nll.defvjp(forward, _last_layer_backward, symbolic_zeros=True)
    return nll


def _chunk_nll(model: Decoder, factors, states, slots, weights, params, base, row: _Row):
    """Computes the weighted loss of a chunk of target tokens.

    Args:
      model: the decoder.
      factors, states, base, row: as in `_last_layer_nll`.
      slots: int32 `[chunk]`, where the target tokens lie among the `tokens`.
      weights: float32 `[chunk]`.
      params: the last layer's parameters.
    """
    config = model.config
    kind = jax.tree.map(lambda x: x[-1], layer_kinds(config))
    layer_fn = Layer(config, model.lora_scale, parent=None)
    norm = RMSNorm(config.rms_norm_eps, config.norm_offset, parent=None)
    drop = _dropout(model, row.batch)
    chunk_rotation = Rotation(*(r[:, :, slots] for r in row.rotation))
    segment_ids = row.batch.segment_ids
    masks = attention.masks(config, Visibility(segment_ids[:, slots], segment_ids, slots))
    (hidden, _), _ = layer_fn.apply(
        {"params": params, "lora": factors},
        (states[:, slots], None),
        kind,
        chunk_rotation,
        masks,
        key_value_source=(states, row.rotation, drop),
        dropout=drop and drop.at(slots),
    )
    hidden = norm.apply({"params": base["norm"]}, hidden[0])
    return jnp.sum(weights * target_nll(model, base, hidden, row.batch.targets[0, slots]))


def _sum_over_chunks(function: Callable, zero, chunk: int, base, row: _Row):
    """Sums `function` over the chunks that target tokens fill.

    Args:
      function: `(slots int32 [chunk], weights float32 [chunk], params, base, row) -> pytree`.
      zero: pytree of zeros in the shape of its result.
      chunk: target tokens of a chunk.
      base, row: as in `_last_layer_nll`.
    """
    params = jax.tree.map(lambda p: p[-1], base["layers"])
    row = jax.tree.map(jnp.asarray, row)  # Constants arrive as arrays of numpy.
    has_loss = row.weights[0] != 0
    size = has_loss.size
    order = jnp.argsort(~jnp.pad(has_loss, (0, -size % chunk)), stable=True)

    def add_chunk(i, sums):
        places = jax.lax.dynamic_slice_in_dim(order, i * chunk, chunk)
        slots = jnp.minimum(places, size - 1)
        # A place behind the end is padding of the last chunk.
        weights = jnp.where(places < size, row.weights[0, slots], 0)
        return jax.tree.map(jnp.add, sums, function(slots, weights, params, base, row))

    with jax.named_scope(TARGET_CHUNKS):
        return jax.lax.fori_loop(0, -(-has_loss.sum() // chunk), add_chunk, zero)


def _last_layer_value(chunk_nll: Callable, chunk: int, factors, states, base, row: _Row):
    """Computes the loss alone; arguments as in `_last_layer_nll`."""
    function = functools.partial(chunk_nll, factors, states)
    return _sum_over_chunks(function, jnp.zeros(()), chunk, base=base, row=row)


def _last_layer_forward(chunk_nll: Callable, chunk: int, *inputs):
    """Forward rule: keeps the gradients with respect to factors and states.

    Args:
      chunk_nll: `_chunk_nll` of a model.
      chunk: target tokens of a chunk.
      *inputs: as in `_last_layer_nll`, each leaf with `perturbed`: whether it is differentiated.
    """
    if any(x.perturbed for x in jax.tree.leaves(inputs[2])):
        raise TypeError("the base is frozen here; use token_nll to train it")
    factors, states, base, row = custom_vjp_primal_tree_values(inputs)
    function = functools.partial(jax.value_and_grad(chunk_nll, (0, 1)), factors, states)
    # Chunks are summed in float32 whatever the dtype of the states.
    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), (factors, states))
    zero = jnp.zeros(()), zeros
    value, gradients = _sum_over_chunks(function, zero, chunk, base=base, row=row)
    return value, jax.tree.map(lambda g, x: g.astype(x.dtype), gradients, (factors, states))


def _last_layer_backward(gradients, cotangent):
    """Backward rule: scales the kept gradients by the cotangent, a float32 scalar."""
    scaled = jax.tree.map(lambda g: (cotangent * g).astype(g.dtype), gradients)
    return *scaled, None, None
