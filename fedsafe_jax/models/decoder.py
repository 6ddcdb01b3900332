"""The decoder of every supported family: one Flax linen module, scanned over stacked layers.

Parameters mirror Hugging Face names (`layers/self_attn/q_proj/kernel`), with every per-layer leaf
stacked on a leading `[layers]` axis. LoRA factors live in a separate `lora` collection of the same
structure, so `model.apply({"params": base, "lora": adapter}, ...)` can be vmapped over adapters
alone while the base is shared. `DecoderConfig` holds what differs between families.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fedsafe_jax.models import attention
from fedsafe_jax.models.attention import Visibility
from fedsafe_jax.models.cache import write_cache
from fedsafe_jax.models.decoder_config import DecoderConfig
from fedsafe_jax.models.quantize import matmul


class RMSNorm(nn.Module):
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
    """`x @ kernel (+ bias)`, plus `lora_scale * x @ a @ b` where `lora` has factors."""

    features: int
    lora_scale: float
    use_bias: bool = False

    @nn.compact
    def __call__(self, x):
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
            y = y + self.lora_scale * ((x @ a.astype(x.dtype)) @ b.astype(x.dtype))
        return y


class Attention(nn.Module):
    """Attention of `x` to itself, to a cache, or to `sources`.

    `sources` are `(states [batch, kv_len, hidden_size], their Rotation)`, which keys and values
    are made from; then `rotation` is that of `x`, and `sight` holds masks of `x` by `sources`.
    """

    config: DecoderConfig
    lora_scale: float

    @nn.compact
    def __call__(self, x, layer, rotation, sight, cache, sources=None):
        config = self.config
        batch, seq, _ = x.shape
        number, table, windowed = layer
        own = (x, rotation.table(table))
        seen = own if sources is None else (sources[0], sources[1].table(table))

        def project(name, heads, x):
            width = heads * config.head_dim
            y = Projection(width, self.lora_scale, config.qkv_bias, name=name)(x)
            return y.reshape(batch, -1, heads, config.head_dim)

        def turned(name, heads, x, rotation):
            y = project(f"{name}_proj", heads, x)
            if config.qk_norm:
                y = RMSNorm(config.rms_norm_eps, config.norm_offset, name=f"{name}_norm")(y)
            return attention.rotate(y, rotation)

        query = turned("q", config.num_heads, *own)
        key = turned("k", config.num_kv_heads, *seen)
        value = project("v_proj", config.num_kv_heads, seen[0])
        scale, softcap = config.attention_scale, config.attention_softcap
        if cache is not None:
            cache, *mine = write_cache(cache, number, key.swapaxes(1, 2), value.swapaxes(1, 2))
        if sources is not None:
            mask = attention.pick(sight, windowed)
            out = attention.attend(query, key, value, mask=mask, scale=scale, softcap=softcap)
        elif cache is None or mine[0].shape[-2] == seq:  # nothing was read before
            out = attention.attend_row(
                config, query, key, value=value, sight=sight, windowed=windowed
            )
        else:
            mask = attention.pick(sight, windowed)
            out = attention.attend_cache(query, *mine, mask, scale, softcap)
        out = out.reshape(batch, seq, config.num_heads * config.head_dim)
        o_proj = Projection(config.hidden_size, self.lora_scale, config.output_bias, name="o_proj")
        return o_proj(out), cache


class MLP(nn.Module):
    config: DecoderConfig
    lora_scale: float

    @nn.compact
    def __call__(self, x):
        config = self.config

        def project(name, features, y):
            return Projection(features, self.lora_scale, config.mlp_bias, name=name)(y)

        gate = project("gate_proj", config.intermediate_size, x)
        up = project("up_proj", config.intermediate_size, x)
        gelu = functools.partial(jax.nn.gelu, approximate=True)
        activation = gelu if config.activation == "gelu_tanh" else jax.nn.silu
        return project("down_proj", config.hidden_size, activation(gate) * up)


class Layer(nn.Module):
    """A layer; `sources` as in `Attention`, not yet normed."""

    config: DecoderConfig
    lora_scale: float

    @nn.compact
    def __call__(self, carry, layer, rotation, sight, sources=None):
        config = self.config
        x, cache = carry

        def norm(name, y):
            return RMSNorm(config.rms_norm_eps, config.norm_offset, name=name)(y)

        input_norm = RMSNorm(config.rms_norm_eps, config.norm_offset, name="input_layernorm")
        if sources is not None:
            sources = input_norm(sources[0]), sources[1]
        attended, cache = Attention(config, self.lora_scale, name="self_attn")(
            input_norm(x), layer, rotation, sight, cache, sources
        )
        mlp = MLP(config, self.lora_scale, name="mlp")
        if config.sandwich_norms:
            x = x + norm("post_attention_layernorm", attended)
            out = mlp(norm("pre_feedforward_layernorm", x))
            x = x + norm("post_feedforward_layernorm", out)
        else:
            x = x + attended
            x = x + mlp(norm("post_attention_layernorm", x))
        return (x, cache), None


def kinds_of_layers(config: DecoderConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each layer its number, its table of rotary frequencies, and whether it has a window."""
    numbers = np.arange(config.num_layers)
    windowed = np.isin(numbers, config.windowed_layers)
    return numbers, attention.frequency_tables(config)[1], windowed


class Decoder(nn.Module):
    """Causal language model.

    Attributes:
      config: the shape.
      lora_scale: applied to the products of the factors in the `lora` collection.
    """

    config: DecoderConfig
    lora_scale: float = 1.0

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
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=config.num_layers,
        )(config, self.lora_scale)
        self.norm = RMSNorm(config.rms_norm_eps, config.norm_offset)

    def __call__(self, tokens, positions, segment_ids=None, cache=None, valid=None):
        """Hidden states after the final norm.

        Args:
          tokens: int32 `[batch, seq]`.
          positions: int32 `[batch, seq]`, counted within each example.
          segment_ids: int32 `[batch, seq]`, 0 for padding; with a cache only for packed rows that
            fill an empty cache of their length.
          cache: a `KVCache` to read and extend, or None.
          valid: bool `[batch, seq]`, with a cache: which of `tokens` are real (left padding is
            not).

        Returns:
          `(hidden [batch, seq, hidden_size], cache)`.
        """
        config, seq = self.config, tokens.shape[1]
        if cache is not None:
            cache = cache._replace(
                valid=jax.lax.dynamic_update_slice(cache.valid, valid, (0, cache.length))
            )
        if segment_ids is not None:
            visibility = Visibility(segment_ids, segment_ids, jnp.arange(seq))
        else:
            new, seen = (x.astype(jnp.int32) for x in (valid, cache.valid))
            visibility = Visibility(new, seen, cache.length + jnp.arange(seq))
        sight, rotation = attention.sight(config, visibility), attention.rotation(config, positions)
        x, layers = self.embed(tokens), kinds_of_layers(config)
        if cache is not None and isinstance(cache.key, tuple):
            x, cache = self._unrolled(x, cache, layers, rotation, sight)
        else:
            layers = jax.tree.map(jnp.asarray, layers)
            (x, cache), _ = self.layers((x, cache), layers, rotation, sight)
        if cache is not None:
            cache = cache._replace(length=cache.length + seq)
        return self.norm(x), cache

    def _unrolled(self, x, cache, layers, rotation, sight):
        """The layers in turn, each with variables (see `unstack`) and a cache of its own."""
        layer_fn = Layer(self.config, self.lora_scale, parent=None)
        keys, values = [], []
        for i, (_, table, windowed) in enumerate(zip(*layers, strict=True)):
            mine = {
                kind: tree["layers"][str(i)]
                for kind, tree in self.variables.items()
                if "layers" in tree
            }
            one = cache._replace(key=cache.key[i], value=cache.value[i])
            (x, one), _ = layer_fn.apply(mine, (x, one), (0, table, windowed), rotation, sight)
            keys.append(one.key)
            values.append(one.value)
        return x, cache._replace(key=tuple(keys), value=tuple(values))

    def embed(self, tokens):
        """What the first layer reads: `[..., hidden_size]` of tokens int32 `[...]`."""
        x = self.embed_tokens[tokens].astype(self.config.dtype)
        if self.config.embedding_scale != 1.0:
            x = x * jnp.asarray(self.config.embedding_scale, self.config.dtype)
        return x

    def unembed(self, hidden):
        """Logits, float32 `[..., vocab]`, of hidden states `[..., hidden_size]`."""
        params = self.variables["params"]
        table = params["lm_head"] if "lm_head" in params else params["embed_tokens"].T
        logits = jnp.dot(hidden, table.astype(hidden.dtype), preferred_element_type=jnp.float32)
        cap = self.config.final_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def logits(self, tokens, positions, segment_ids):
        """Float32 `[batch, seq, vocab]`; for short inputs, as every logit is materialised."""
        hidden, _ = self(tokens, positions, segment_ids)
        return self.unembed(hidden)


def target_nll(model: Decoder, params, hidden, targets) -> jax.Array:
    """Negative log-likelihood, float32 `[tokens]` in nats, of targets int32 `[tokens]` after hidden
    states `[tokens, hidden_size]`; every logit is materialised."""
    logits = model.apply({"params": params}, hidden, method="unembed")
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


@functools.lru_cache
def param_shapes(config: DecoderConfig) -> dict:
    """The pytree of parameters as `jax.ShapeDtypeStruct`s, float32."""
    blank = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(Decoder(config).init, jax.random.key(0), blank, blank, blank)["params"]


def num_parameters(config: DecoderConfig) -> int:
    """Parameter count; a tied embedding counts once."""
    return sum(leaf.size for leaf in jax.tree.leaves(param_shapes(config)))
