"""The loss of a packed row, with the last layer computed for learned tokens alone.

Of prompts and padding the last layer has to give keys and values; what else it makes of them
nobody reads. In a row of Dolly five tokens of six are such. The count of learned tokens is data, so
they are taken in chunks, as many as they fill, and a chunk's gradient is taken along with its loss.
"""

import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import custom_vjp_primal_tree_values

from fedsafe_jax.models import attention
from fedsafe_jax.models.attention import Rotation, Visibility
from fedsafe_jax.models.decoder import Decoder, Layer, RMSNorm, kinds_of_layers, target_nll

CHUNK_TOKENS = 128  # each chunk makes the row's keys and values anew


def weighted_nll(model: Decoder, adapter, base, batch, weights) -> jax.Array:
    """The sum over tokens of `weights` times their negative log-likelihood, in nats.

    Args:
      model: the decoder.
      adapter: LoRA factors.
      base: base parameters, frozen.
      batch: `data.packing.Batch` with fields `[rows, seq]`, few tokens in all: the last layer's
        scores are dense, of a chunk with all of them.
      weights: float32 `[rows, seq]`, zero where nothing is learned.

    Raises:
      TypeError: the gradient to the base is asked for.
    """
    rotation = attention.rotation(model.config, batch.positions)
    x = _before_last(model, adapter, base, batch, rotation)
    last = jax.tree.map(lambda x: x[-1], adapter["layers"])
    # One row from here on, in which the segments of different rows stay apart.
    rows, seq = batch.mask.shape
    apart = batch.segment_ids + (seq + 1) * jnp.arange(rows)[:, None]
    batch = batch._replace(segment_ids=apart)
    batch, weights = jax.tree.map(lambda x: jnp.reshape(x, (1, -1)), (batch, weights))
    rotation = Rotation(*(r.reshape(len(r), 1, rows * seq, *r.shape[3:]) for r in rotation))
    return _last(model)(last, x.reshape(1, rows * seq, -1), base, rotation, batch, weights)


def _before_last(model: Decoder, adapter, base, batch, rotation):
    """What the last layer reads, `[rows, seq, hidden_size]`."""
    config = model.config
    slots = jnp.arange(batch.tokens.shape[1])
    sight = attention.sight(config, Visibility(batch.segment_ids, batch.segment_ids, slots))
    layer_fn = Layer(config, model.lora_scale, parent=None)

    def one(x, inputs):
        layer, lora = inputs
        # By number, as a slice of all but the last would be a copy of the base.
        params = jax.tree.map(
            lambda p: jax.lax.dynamic_index_in_dim(p, layer[0], keepdims=False), base["layers"]
        )
        variables = {"params": params, "lora": lora}
        (x, _), _ = layer_fn.apply(variables, (x, None), layer, rotation, sight)
        return x, None

    def kept(primitive, *_, **params):
        """All that the gradient needs but the layer's own weights, which are read again."""
        return primitive.name not in ("dynamic_slice", "squeeze")

    one = jax.checkpoint(one, prevent_cse=False, policy=None if config.remat else kept)
    inputs = kinds_of_layers(config), adapter["layers"]
    inputs = jax.tree.map(lambda x: jnp.asarray(x[: config.num_layers - 1]), inputs)
    x = model.apply({"params": base}, batch.tokens, method="embed")
    return jax.lax.scan(one, x, inputs)[0]


@functools.lru_cache(maxsize=16)
def _last(model: Decoder):
    """`(last layer's LoRA, states, base, rotation, batch, weights) -> weighted_nll`."""
    config = model.config
    layer = tuple(x[-1] for x in kinds_of_layers(config))
    layer_fn = Layer(config, model.lora_scale, parent=None)
    norm = RMSNorm(config.rms_norm_eps, config.norm_offset, parent=None)

    def chunk_loss(lora, x, slots, weights, params, base, rotation, batch):
        turned = Rotation(*(r[:, :, slots] for r in rotation))
        seen = attention.masks(
            config, Visibility(batch.segment_ids[:, slots], batch.segment_ids, slots)
        )
        variables = {"params": params, "lora": lora}
        (h, _), _ = layer_fn.apply(
            variables, (x[:, slots], None), layer, turned, seen, (x, rotation)
        )
        h = norm.apply({"params": base["norm"]}, h[0])
        return jnp.sum(weights * target_nll(model, base, h, batch.targets[0, slots]))

    def by_chunk(function, zero, base, rotation, batch, weights):
        """The sum of `function(slots, weights, ...)` over the chunks that learned tokens fill."""
        params = jax.tree.map(lambda p: p[-1], base["layers"])
        batch, weights = jax.tree.map(jnp.asarray, (batch, weights))  # constants arrive as numpy's
        on = weights[0] != 0
        size, chunk = on.size, min(CHUNK_TOKENS, on.size)
        order = jnp.argsort(~jnp.pad(on, (0, -size % chunk)), stable=True)

        def body(i, sums):
            places = jax.lax.dynamic_slice_in_dim(order, i * chunk, chunk)
            slots = jnp.minimum(places, size - 1)
            mine = jnp.where(places < size, weights[0, slots], 0)
            new = function(slots, mine, params, base, rotation, batch)
            return jax.tree.map(jnp.add, sums, new)

        return jax.lax.fori_loop(0, -(-on.sum() // chunk), body, zero)

    def alone(lora, x, *rest):
        return by_chunk(functools.partial(chunk_loss, lora, x), jnp.zeros(()), *rest)

    def forward(*inputs):
        if any(x.perturbed for x in jax.tree.leaves(inputs[2])):
            raise TypeError("the base is frozen here; use token_nll to train it")
        lora, x, *rest = custom_vjp_primal_tree_values(inputs)

        def with_gradient(*chunk):
            return jax.value_and_grad(chunk_loss, (0, 1))(lora, x, *chunk)

        zero = jnp.zeros(()), jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), (lora, x))
        value, gradients = by_chunk(with_gradient, zero, *rest)
        return value, jax.tree.map(lambda g, x: g.astype(x.dtype), gradients, (lora, x))

    def backward(gradients, factor):
        mine = jax.tree.map(lambda g: (factor * g).astype(g.dtype), gradients)
        return *mine, None, None, None, None

    nll = jax.custom_vjp(alone)
    nll.defvjp(forward, backward, symbolic_zeros=True)
    return nll
