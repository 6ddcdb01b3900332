"""The Llama-family decoder: one Flax linen module, scanned over stacked layers.

Parameters mirror Hugging Face names (`layers/self_attn/q_proj/kernel`), with every per-layer leaf
stacked on a leading `[layers]` axis. LoRA factors live in a separate `lora` collection of the same
structure, so `model.apply({"params": base, "lora": adapter}, ...)` can be vmapped over adapters
alone while the base is shared.
"""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedsafe_jax.models import attention

PROJECTIONS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder; hashable, so that it can be a static argument of `jax.jit`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rope_scaling: tuple | None = None
    rms_norm_eps: float = 1e-5
    tie_embeddings: bool = True
    max_length: int = 2048
    dtype: str = "float32"
    remat: bool = False

    def projection_shape(self, name: str) -> tuple[int, int]:
        """`(in, out)` of one linear projection, by its Hugging Face name."""
        hidden, heads = self.hidden_size, self.num_heads * self.head_dim
        kv, wide = self.num_kv_heads * self.head_dim, self.intermediate_size
        shapes = {
            "q_proj": (hidden, heads),
            "k_proj": (hidden, kv),
            "v_proj": (hidden, kv),
            "o_proj": (heads, hidden),
            "gate_proj": (hidden, wide),
            "up_proj": (hidden, wide),
            "down_proj": (wide, hidden),
        }
        return shapes[name]

    def num_parameters(self) -> int:
        """Parameter count; a tied embedding counts once."""
        linear = sum(
            a * b
            for group in PROJECTIONS.values()
            for a, b in (self.projection_shape(name) for name in group)
        )
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        norms = self.hidden_size * (2 * self.num_layers + 1)
        return self.num_layers * linear + embeddings + norms


class KVCache(NamedTuple):
    """Keys and values of the tokens seen so far."""

    key: jax.Array  # [layers, batch, cache_len, kv_heads, head_dim]
    value: jax.Array  # [layers, batch, cache_len, kv_heads, head_dim]
    valid: jax.Array  # bool [batch, cache_len]: slot holds a real token
    length: jax.Array  # int32 scalar: next slot to write


def empty_cache(config: DecoderConfig, batch: int, cache_len: int) -> KVCache:
    """A cache of `cache_len` slots without a token in it."""
    shape = (config.num_layers, batch, cache_len, config.num_kv_heads, config.head_dim)
    zeros = jnp.zeros(shape, config.dtype)
    valid = jnp.zeros((batch, cache_len), bool)
    return KVCache(zeros, zeros, valid, jnp.zeros((), jnp.int32))


class RMSNorm(nn.Module):
    epsilon: float

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        # float32 inside: the mean of squares loses precision in bfloat16.
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.epsilon)
        return (wide * scale.astype(jnp.float32)).astype(x.dtype)


class Projection(nn.Module):
    """`x @ kernel`, plus `lora_scale * x @ a @ b` where the `lora` collection has factors."""

    features: int
    lora_scale: float

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        y = x @ kernel.astype(x.dtype)
        if self.has_variable("lora", "a"):
            a, b = self.get_variable("lora", "a"), self.get_variable("lora", "b")
            y = y + self.lora_scale * ((x @ a.astype(x.dtype)) @ b.astype(x.dtype))
        return y


class Attention(nn.Module):
    config: DecoderConfig
    lora_scale: float

    @nn.compact
    def __call__(self, x, layer, positions, mask, cache):
        config = self.config
        batch, seq, _ = x.shape

        def project(name, heads):
            y = Projection(heads * config.head_dim, self.lora_scale, name=name)(x)
            return y.reshape(batch, seq, heads, config.head_dim)

        frequency = attention.rotary_frequencies(
            config.head_dim, config.rope_theta, config.rope_scaling
        )
        query = attention.rotate(project("q_proj", config.num_heads), positions, frequency)
        key = attention.rotate(project("k_proj", config.num_kv_heads), positions, frequency)
        value = project("v_proj", config.num_kv_heads)
        if cache is not None:
            start = (layer, 0, cache.length, 0, 0)
            cache = cache._replace(
                key=jax.lax.dynamic_update_slice(cache.key, key[None], start),
                value=jax.lax.dynamic_update_slice(cache.value, value[None], start),
            )
            key = jax.lax.dynamic_index_in_dim(cache.key, layer, keepdims=False)
            value = jax.lax.dynamic_index_in_dim(cache.value, layer, keepdims=False)
        out = attention.attend(query, key, value, mask)
        out = out.reshape(batch, seq, config.num_heads * config.head_dim)
        return Projection(config.hidden_size, self.lora_scale, name="o_proj")(out), cache


class MLP(nn.Module):
    config: DecoderConfig
    lora_scale: float

    @nn.compact
    def __call__(self, x):
        wide = self.config.intermediate_size
        gate = Projection(wide, self.lora_scale, name="gate_proj")(x)
        up = Projection(wide, self.lora_scale, name="up_proj")(x)
        hidden = jax.nn.silu(gate) * up
        return Projection(self.config.hidden_size, self.lora_scale, name="down_proj")(hidden)


class Layer(nn.Module):
    config: DecoderConfig
    lora_scale: float

    @nn.compact
    def __call__(self, carry, layer, positions, mask):
        x, cache = carry
        epsilon = self.config.rms_norm_eps
        attended, cache = Attention(self.config, self.lora_scale, name="self_attn")(
            RMSNorm(epsilon, name="input_layernorm")(x), layer, positions, mask, cache
        )
        x = x + attended
        normed = RMSNorm(epsilon, name="post_attention_layernorm")(x)
        x = x + MLP(self.config, self.lora_scale, name="mlp")(normed)
        return (x, cache), None


class Decoder(nn.Module):
    """Causal language model.

    Attributes:
      config: the shape.
      lora_scale: `alpha / rank` applied to the factors in the `lora` collection.
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
        self.norm = RMSNorm(config.rms_norm_eps)

    def __call__(self, tokens, positions, segment_ids=None, cache=None, valid=None):
        """Hidden states after the final norm.

        Args:
          tokens: int32 `[batch, seq]`.
          positions: int32 `[batch, seq]`, counted within each example.
          segment_ids: int32 `[batch, seq]`, 0 for padding; required without a cache.
          cache: a `KVCache` to read and extend, or None.
          valid: bool `[batch, seq]`, with a cache: which of `tokens` are real (left padding is
            not).

        Returns:
          `(hidden [batch, seq, hidden_size], cache)`.
        """
        seq = tokens.shape[1]
        if cache is None:
            mask = attention.packed_causal_mask(segment_ids)
        else:
            cache = cache._replace(
                valid=jax.lax.dynamic_update_slice(cache.valid, valid, (0, cache.length))
            )
            slots = jnp.arange(cache.valid.shape[1])
            causal = slots[None, :] <= cache.length + jnp.arange(seq)[:, None]
            mask = (cache.valid[:, None, :] & causal[None])[:, None]
        x = self.embed_tokens[tokens].astype(self.config.dtype)
        layers = jnp.arange(self.config.num_layers)
        (x, cache), _ = self.layers((x, cache), layers, positions, mask)
        if cache is not None:
            cache = cache._replace(length=cache.length + seq)
        return self.norm(x), cache

    def unembed(self, hidden):
        """Logits, float32 `[..., vocab]`, of hidden states `[..., hidden_size]`."""
        table = self.embed_tokens.T if self.config.tie_embeddings else self.lm_head
        return jnp.dot(hidden, table.astype(hidden.dtype), preferred_element_type=jnp.float32)

    def logits(self, tokens, positions, segment_ids):
        """Float32 `[batch, seq, vocab]`; for short inputs, as every logit is materialised."""
        hidden, _ = self(tokens, positions, segment_ids)
        return self.unembed(hidden)
