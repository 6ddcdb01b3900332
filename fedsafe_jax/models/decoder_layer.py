"""One layer of the decoder: norms, projections with their LoRA factors, attention, MLP."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fedsafe_jax.models import attention, owned_lora, rotary
from fedsafe_jax.models.by_owner import by_owner
from fedsafe_jax.models.cache import write_cache
from fedsafe_jax.models.decoder_config import DecoderConfig
from fedsafe_jax.models.quantize import matmul


class LayerKind(NamedTuple):
    """What differs between layers, beside their weights; scalars, or arrays `[layers]`.

    Attributes:
      index: int, the layer's number among those of the cache and the base.
      table: int, index of its table of rotary frequencies.
      windowed: bool, whether its attention has a window.
    """

    index: jax.Array
    table: jax.Array
    windowed: jax.Array


class RMSNorm(nn.Module):
    """Root mean square norm (arXiv 1910.07467): `x / rms(x) * (offset + scale)`.

    Attributes:
      epsilon: added to the mean square.
      offset: added to the learned scale (1 for Gemma, whose scale starts at 0).
    """

    epsilon: float
    offset: float = 0.0

    @nn.compact
    def __call__(self, x):
        initial = nn.initializers.constant(1.0 - self.offset)
        scale = self.param("scale", initial, (x.shape[-1],))
        # float32 inside: the mean of squares loses precision in bfloat16.
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.epsilon)
        return (wide * (self.offset + scale.astype(jnp.float32))).astype(x.dtype)


class Projection(nn.Module):
    """`x @ kernel (+ bias)`, plus `lora_scale * x @ a @ b` where `lora` has factors.

    With `dropout`, a `dropout.Dropout`, numbers of the `x` that factors see are dropped, as in
    peft; every projection drops its own. With `owner`, int32 `[batch]`, factors are
    `[clients, in, rank]` and `[clients, rank, out]`, and each row takes its owner's (`by_owner`);
    with an owner of each token beside the factors these are of several adapters (`owned_lora`).
    """

    features: int
    lora_scale: float
    use_bias: bool = False

    @nn.compact
    def __call__(self, x, dropout=None, owner=None):
        if self.has_variable("params", "kernel"):
            kernel = self.get_variable("params", "kernel")  # an array, or quantised
        else:
            shape = (x.shape[-1], self.features)
            kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        y = matmul(x, kernel)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = y + bias.astype(x.dtype)
        if self.has_variable("lora", "a"):
            a, b = self.get_variable("lora", "a"), self.get_variable("lora", "b")
            if dropout is not None:
                x = dropout.apply(x, self.name)
            if owner is not None:
                update = by_owner(by_owner(x, a, owner), b, owner)
            elif self.has_variable("lora", "owner"):
                owners = self.get_variable("lora", "owner")
                a, b = a.astype(x.dtype), b.astype(x.dtype)
                update = owned_lora.product(x, a, b, owner=owners)
            else:
                update = (x @ a.astype(x.dtype)) @ b.astype(x.dtype)
            y = y + self.lora_scale * update
        return y


class Attention(nn.Module):
    """Attention of `x` to itself, to a cache, or to other states.

    Args:
      x: `[batch, seq, hidden_size]`, which queries are computed from.
      kind: the layer's `LayerKind`, of scalars.
      rotation: rotary positions of `x`, all tables.
      masks_or_segments: what `attention.attention_inputs` returns, for queries by keys.
      cache: a `KVCache` to read and extend, or None.
      key_value_source: `(states [batch, kv_len, hidden_size], their Rotation, their Dropout)`,
        which keys and values are computed from; None for `x`. With it, `masks_or_segments` must be
        masks.
      dropout: a `dropout.Dropout` of the adapter's inputs, for the tokens of `x`; None for none.
      owner: int32 `[batch]`, the client of each row, see `Projection`; None for one adapter.

    Returns:
      `(out [batch, seq, hidden_size], cache)`.
    """

    config: DecoderConfig
    lora_scale: float

    @nn.compact
    def __call__(
        self,
        x,
        kind: LayerKind,
        rotation,
        masks_or_segments,
        cache,
        key_value_source=None,
        dropout=None,
        owner=None,
    ):
        config = self.config
        batch, seq, _ = x.shape
        query_rotation = rotation.table(kind.table)
        key_value_states, key_rotation, key_dropout = x, query_rotation, dropout
        if key_value_source is not None:
            key_value_states, key_rotation, key_dropout = key_value_source
            key_rotation = key_rotation.table(kind.table)

        def project(name, heads, states, dropout):
            width = heads * config.head_dim
            projection = Projection(width, self.lora_scale, config.qkv_bias, name=name)
            y = projection(states, dropout, owner)
            return y.reshape(batch, -1, heads, config.head_dim)

        def project_and_rotate(name, heads, states, rotation, dropout):
            y = project(f"{name}_proj", heads, states, dropout)
            if config.qk_norm:
                y = RMSNorm(config.rms_norm_eps, config.norm_offset, name=f"{name}_norm")(y)
            return rotary.rotate(y, rotation)

        query = project_and_rotate("q", config.num_heads, x, query_rotation, dropout)
        key = project_and_rotate(
            "k", config.num_kv_heads, key_value_states, rotation=key_rotation, dropout=key_dropout
        )
        value = project("v_proj", config.num_kv_heads, key_value_states, key_dropout)
        scale, softcap = config.attention_scale, config.attention_softcap
        if cache is not None:
            cache, cached_keys, cached_values = write_cache(
                cache, kind.index, key.swapaxes(1, 2), value.swapaxes(1, 2)
            )
        if key_value_source is not None:
            mask = attention.select_mask(masks_or_segments, kind.windowed)
            out = attention.attend(query, key, value, mask=mask, scale=scale, softcap=softcap)
        elif cache is None or cached_keys.shape[-2] == seq:
            # Without a cache, or with one that these tokens fill, no earlier key is attended to.
            out = attention.attend_row(
                config,
                query,
                key,
                value=value,
                masks_or_segments=masks_or_segments,
                windowed=kind.windowed,
            )
        else:
            mask = attention.select_mask(masks_or_segments, kind.windowed)
            out = attention.attend_cache(
                query, cached_keys, cached_values, mask=mask, scale=scale, softcap=softcap
            )
        out = out.reshape(batch, seq, config.num_heads * config.head_dim)
        o_proj = Projection(config.hidden_size, self.lora_scale, config.output_bias, name="o_proj")
        return o_proj(out, dropout, owner), cache


class MLP(nn.Module):
    """Gated MLP: `down(activation(gate(x)) * up(x))`."""

    config: DecoderConfig
    lora_scale: float

    @nn.compact
    def __call__(self, x, dropout=None, owner=None):
        config = self.config

        def project(name, features, y):
            projection = Projection(features, self.lora_scale, config.mlp_bias, name=name)
            return projection(y, dropout, owner)

        gate = project("gate_proj", config.intermediate_size, x)
        up = project("up_proj", config.intermediate_size, x)
        gelu = functools.partial(jax.nn.gelu, approximate=True)
        activation = gelu if config.activation == "gelu_tanh" else jax.nn.silu
        return project("down_proj", config.hidden_size, activation(gate) * up)


class Layer(nn.Module):
    """One layer: attention and MLP, each with norms and a residual.

    Args:
      carry: `(x [batch, seq, hidden_size], cache or None)`, as `nn.scan` passes it on.
      kind, rotation, masks_or_segments: as in `Attention`.
      key_value_source: as in `Attention`, but its states are not normed yet.
      dropout: a `dropout.Dropout` of all layers, as in `Attention`; so is that of
        `key_value_source`.
      owner: as in `Attention`.

    Returns:
      `((x, cache), None)`.
    """

    config: DecoderConfig
    lora_scale: float

    @nn.compact
    def __call__(
        self,
        carry,
        kind: LayerKind,
        rotation,
        masks_or_segments,
        key_value_source=None,
        dropout=None,
        owner=None,
    ):
        config = self.config
        dropout = dropout and dropout.of_layer(kind.index)
        x, cache = carry

        def norm(name, y):
            return RMSNorm(config.rms_norm_eps, config.norm_offset, name=name)(y)

        input_norm = RMSNorm(config.rms_norm_eps, config.norm_offset, name="input_layernorm")
        if key_value_source is not None:
            states, key_rotation, key_dropout = key_value_source
            key_dropout = key_dropout and key_dropout.of_layer(kind.index)
            key_value_source = input_norm(states), key_rotation, key_dropout
        attended, cache = Attention(config, self.lora_scale, name="self_attn")(
            input_norm(x),
            kind,
            rotation,
            masks_or_segments=masks_or_segments,
            cache=cache,
            key_value_source=key_value_source,
            dropout=dropout,
            owner=owner,
        )
        mlp = MLP(config, self.lora_scale, name="mlp")
        if config.sandwich_norms:
            x = x + norm("post_attention_layernorm", attended)
            out = mlp(norm("pre_feedforward_layernorm", x), dropout, owner)
            x = x + norm("post_feedforward_layernorm", out)
        else:
            x = x + attended
            x = x + mlp(norm("post_attention_layernorm", x), dropout, owner)
        return (x, cache), None


def layer_kinds(config: DecoderConfig) -> LayerKind:
    """Returns the `LayerKind` of all layers; each field is a numpy array `[layers]`."""
    index = np.arange(config.num_layers)
    windowed = np.isin(index, config.windowed_layers)
    return LayerKind(index, rotary.frequency_tables(config)[1], windowed)
