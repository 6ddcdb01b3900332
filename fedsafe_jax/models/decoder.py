"""The decoder of every supported family: one Flax linen module, scanned over stacked layers.

Parameters mirror Hugging Face names (`layers/self_attn/q_proj/kernel`), with every per-layer leaf
stacked on a leading `[layers]` axis. LoRA factors live in a separate `lora` collection of the same
structure, so `model.apply({"params": base, "lora": factors}, ...)` can be vmapped over the factors
alone while the base is shared (see `flatten_vmap`). `DecoderConfig` holds what differs between
families.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fedsafe_jax import random_streams
from fedsafe_jax.models import attention, dropout, rotary
from fedsafe_jax.models.cache import KVCache, write_cache
from fedsafe_jax.models.decoder_config import DecoderConfig
from fedsafe_jax.models.precision import own_precision
from fedsafe_jax.models.quantize import matmul
from fedsafe_jax.models.rotary import Rotation
from fedsafe_jax.models.visibility import Visibility
from fedsafe_jax.random_streams import Purpose


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
    peft; every projection drops its own.
    """

    features: int
    lora_scale: float
    use_bias: bool = False

    @nn.compact
    def __call__(self, x, dropout=None):
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
            y = y + self.lora_scale * ((x @ a.astype(x.dtype)) @ b.astype(x.dtype))
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
            y = Projection(width, self.lora_scale, config.qkv_bias, name=name)(states, dropout)
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
        return o_proj(out, dropout), cache


class MLP(nn.Module):
    """Gated MLP: `down(activation(gate(x)) * up(x))`."""

    config: DecoderConfig
    lora_scale: float

    @nn.compact
    def __call__(self, x, dropout=None):
        config = self.config

        def project(name, features, y):
            return Projection(features, self.lora_scale, config.mlp_bias, name=name)(y, dropout)

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
        )
        mlp = MLP(config, self.lora_scale, name="mlp")
        if config.sandwich_norms:
            x = x + norm("post_attention_layernorm", attended)
            out = mlp(norm("pre_feedforward_layernorm", x), dropout)
            x = x + norm("post_feedforward_layernorm", out)
        else:
            x = x + attended
            x = x + mlp(norm("post_attention_layernorm", x), dropout)
        return (x, cache), None


def layer_kinds(config: DecoderConfig) -> LayerKind:
    """Returns the `LayerKind` of all layers; each field is a numpy array `[layers]`."""
    index = np.arange(config.num_layers)
    windowed = np.isin(index, config.windowed_layers)
    return LayerKind(index, rotary.frequency_tables(config)[1], windowed)


def _in_own_precision(method: Callable) -> Callable:
    """Returns a method whose products are computed in float32 where the model is float32."""

    @functools.wraps(method)
    def wrapped(self, *args, **kwargs):
        with own_precision(self.config.dtype):
            return method(self, *args, **kwargs)

    return wrapped


class Decoder(nn.Module):
    """Causal language model.

    Attributes:
      config: the model's shape.
      lora_scale: factor of the products of the factors in the `lora` collection.
      lora_dropout: rate of dropout of the factors' inputs, where `noise` is given.
    """

    config: DecoderConfig
    lora_scale: float = 1.0
    lora_dropout: float = 0.0

    def setup(self):
        config = self.config
        self.embed_tokens = self.param(
            "embed_tokens", nn.initializers.normal(0.02), (config.vocab_size, config.hidden_size)
        )
        if not config.tie_embeddings:
            self.lm_head = self.param(
                "lm_head", nn.initializers.normal(0.02), (config.hidden_size, config.vocab_size)
            )
        layer = nn.remat(Layer, prevent_cse=False) if config.remat else Layer
        self.layers = nn.scan(
            layer,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=(0, *[nn.broadcast] * 4),
            length=config.num_layers,
        )(config, self.lora_scale)
        self.norm = RMSNorm(config.rms_norm_eps, config.norm_offset)

    @_in_own_precision
    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None = None,
        cache: KVCache | None = None,
        valid: jax.Array | None = None,
        noise: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Computes hidden states after the final norm.

        Args:
          tokens: int32 `[batch, seq]`.
          positions: int32 `[batch, seq]`, counted within each example.
          segment_ids: int32 `[batch, seq]`, 0 for padding; with a cache only for packed rows that
            fill an empty cache of their length.
          cache: a `KVCache` to read and extend, or None.
          valid: bool `[batch, seq]`, with a cache: which of `tokens` are real (left padding is
            not).
          noise: uint32 `[batch, seq]`, from which dropout of the adapter's inputs is drawn while
            it is trained, without a cache; None for no dropout.

        Returns:
          `(hidden [batch, seq, hidden_size], cache)`.
        """
        config, seq = self.config, tokens.shape[1]
        if cache is not None:
            cache = cache._replace(
                valid=jax.lax.dynamic_update_slice(cache.valid, valid, (0, cache.length))
            )
        if segment_ids is not None:
            visibility = Visibility.in_rows(segment_ids)
        else:
            # In a cache each row is one example: real tokens are segment 1, padding is 0.
            queries, keys = (x.astype(jnp.int32) for x in (valid, cache.valid))
            visibility = Visibility(queries, keys, cache.length + jnp.arange(seq))
        masks_or_segments = attention.attention_inputs(config, visibility)
        rotation = rotary.rotation(config, positions)
        x, kinds = self.embed(tokens), layer_kinds(config)
        if cache is not None and isinstance(cache.key, tuple):
            x, cache = self._unrolled(x, cache, kinds, rotation, masks_or_segments)
        else:
            kinds = jax.tree.map(jnp.asarray, kinds)
            drop = dropout.of_noise(noise, self.lora_dropout)
            (x, cache), _ = self.layers((x, cache), kinds, rotation, masks_or_segments, None, drop)
        if cache is not None:
            cache = cache._replace(length=cache.length + seq)
        return self.norm(x), cache

    def _unrolled(self, x, cache: KVCache, kinds: LayerKind, rotation: Rotation, masks_or_segments):
        """Applies the layers one by one, with separate variables (`unstack`) and caches."""
        layer_fn = Layer(self.config, self.lora_scale, parent=None)
        keys, values = [], []
        for i, (_, table, windowed) in enumerate(zip(*kinds, strict=True)):
            variables = {
                collection: tree["layers"][str(i)]
                for collection, tree in self.variables.items()
                if "layers" in tree
            }
            layer_cache = cache._replace(key=cache.key[i], value=cache.value[i])
            kind = LayerKind(0, table, windowed)  # A layer's own cache has no axis of layers.
            (x, layer_cache), _ = layer_fn.apply(
                variables, (x, layer_cache), kind, rotation, masks_or_segments
            )
            keys.append(layer_cache.key)
            values.append(layer_cache.value)
        return x, cache._replace(key=tuple(keys), value=tuple(values))

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Returns the first layer's input, `[..., hidden_size]`, for tokens int32 `[...]`."""
        x = self.embed_tokens[tokens].astype(self.config.dtype)
        if self.config.embedding_scale != 1.0:
            x = x * jnp.asarray(self.config.embedding_scale, self.config.dtype)
        return x

    @_in_own_precision
    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Returns logits, float32 `[..., vocab]`, for hidden states `[..., hidden_size]`."""
        params = self.variables["params"]
        table = params["lm_head"] if "lm_head" in params else params["embed_tokens"].T
        logits = jnp.dot(hidden, table.astype(hidden.dtype), preferred_element_type=jnp.float32)
        cap = self.config.final_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def logits(self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
        """Returns float32 `[batch, seq, vocab]`; for short inputs, as every logit is held."""
        hidden, _ = self(tokens, positions, segment_ids)
        return self.unembed(hidden)


def target_nll(model: Decoder, params: dict, hidden: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the negative log-likelihood of targets; every logit is held.

    Args:
      model: the decoder, for its unembedding.
      params: base parameters.
      hidden: `[tokens, hidden_size]`.
      targets: int32 `[tokens]`.

    Returns:
      float32 `[tokens]`, in nats.
    """
    logits = model.apply({"params": params}, hidden, method="unembed")
    target_logits = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits, axis=-1) - target_logits


@functools.lru_cache
def param_shapes(config: DecoderConfig) -> dict:
    """Returns the pytree of base parameters as `jax.ShapeDtypeStruct`s, float32."""
    blank = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(
        Decoder(config).init, random_streams.key(Purpose.SHAPES, 0), blank, blank, blank
    )["params"]


def num_parameters(config: DecoderConfig) -> int:
    """Returns the number of parameters; a tied embedding counts once."""
    return sum(leaf.size for leaf in jax.tree.leaves(param_shapes(config)))
