"""Bidirectional encoders with a classification head: BERT, RoBERTa, ModernBERT, and a small one.

One Flax linen module; a family is a row of differences in `EncoderConfig`, which
`encoder_hub.from_hf` reads from a transformers config.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedsafe_jax.models import rotary
from fedsafe_jax.models.sharding import platform_of

ACTIVATIONS = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": nn.gelu,
    "relu": nn.relu,
}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Shape of an encoder; hashable. The defaults are a small encoder, trained from scratch.

    Attributes:
      vocab_size, hidden_size, num_layers, num_heads, intermediate_size: sizes.
      max_length: longest input, in tokens.
      num_types: number of token types (request and response); 0 for a model without types.
      num_labels: number of classes.
      dropout: dropout rate of hidden states while training.
      pre_norm: whether norms come before attention and MLP, with one at the end, or after each
        (BERT).
      embedding_norm: whether embeddings have a norm.
      first_norm: whether the first layer has a norm before attention (ModernBERT's has not).
      norm_epsilon: added to the variance.
      use_bias, norm_bias: whether projections and norms have biases.
      gated_mlp: `activation(x W) * (x V)` instead of `activation(x W)`.
      activation: one of `ACTIVATIONS`.
      rotary_thetas: bases of rotary positions in global and local layers; None for learned
        positions.
      window: largest distance, in tokens, of keys that local layers attend to.
      local_layers: indices of local layers.
      position_offset: index of the first learned position (RoBERTa: 2).
      pooling: `mean` over tokens, or `first`.
      head: layer between pooling and classes: `linear` (none), `tanh` (dense with tanh), or `norm`
        (dense with the activation and a norm).
      head_bias: whether the head's last layer has a bias.
      platform: platform of the devices that compute, see `sharding.platform_of`; the first device's
        unless it is given. It is no part of a saved encoder.
    """

    vocab_size: int
    hidden_size: int = 128
    num_layers: int = 2
    num_heads: int = 4
    intermediate_size: int = 512
    max_length: int = 128
    num_types: int = 2
    num_labels: int = 2
    dropout: float = 0.1
    pre_norm: bool = True
    embedding_norm: bool = False
    first_norm: bool = True
    norm_epsilon: float = 1e-6
    use_bias: bool = True
    norm_bias: bool = True
    gated_mlp: bool = False
    activation: str = "gelu_tanh"
    rotary_thetas: tuple[float, float] | None = None
    window: int = 0
    local_layers: tuple[int, ...] = ()
    position_offset: int = 0
    pooling: str = "mean"
    head: str = "linear"
    head_bias: bool = True
    platform: str = dataclasses.field(default_factory=functools.partial(platform_of, None))


def _norm(config: EncoderConfig, name: str):
    return nn.LayerNorm(epsilon=config.norm_epsilon, use_bias=config.norm_bias, name=name)


def _rotate(x, positions, theta: float):
    """Applies rotary positions int32 `[batch, seq]` to `[batch, seq, heads, head_dim]`."""
    angle = positions[:, :, None, None] * rotary.inverse_frequencies(theta, x.shape[-1])
    return rotary.rotate(x, rotary.Rotation(jnp.sin(angle), jnp.cos(angle)))


def _attend(query, key, value, mask, platform: str):
    """Computes scaled dot-product attention.

    On CPU the scores have the axis of keys first: there XLA reduces across rows with vector
    instructions, but along a row one number at a time, so the softmax takes half the time.

    Args:
      query: `[batch, q_len, heads, head_dim]`.
      key, value: `[batch, kv_len, heads, head_dim]`.
      mask: bool `[batch, 1, q_len, kv_len]`.
      platform: platform of the devices that compute.
    """
    if platform != "cpu":
        return jax.nn.dot_product_attention(query, key, value, mask=mask)
    query = query * query.shape[-1] ** -0.5
    scores = jnp.einsum("bshd,bthd->bhst", key, query)
    scores = jnp.where(jnp.swapaxes(mask, -1, -2), scores, jnp.finfo(scores.dtype).min)
    return jnp.einsum("bhst,bshd->bthd", jax.nn.softmax(scores, axis=-2), value)


class SelfAttention(nn.Module):
    """Bidirectional attention of the first `queries` tokens to all tokens.

    Attributes:
      config: the encoder's config.
      local: whether the layer has a window.
    """

    config: EncoderConfig
    local: bool

    @nn.compact
    def __call__(self, x, mask, positions, queries):
        config = self.config
        batch, _, width = x.shape

        def project(name, y):
            y = nn.Dense(width, use_bias=config.use_bias, name=name)(y)
            return y.reshape(batch, y.shape[1], config.num_heads, -1)

        query = project("query", x[:, :queries])
        key, value = project("key", x), project("value", x)
        if config.rotary_thetas is not None:
            theta = config.rotary_thetas[int(self.local)]
            query = _rotate(query, positions[:, :queries], theta)
            key = _rotate(key, positions, theta)
        out = _attend(query, key, value, mask[:, :, :queries], config.platform)
        out = out.reshape(batch, -1, width)
        return nn.Dense(width, use_bias=config.use_bias, name="output")(out)


class EncoderLayer(nn.Module):
    """One layer: attention and MLP, each with a norm and a residual.

    Attributes:
      config: the encoder's config.
      number: index of the layer.
    """

    config: EncoderConfig
    number: int

    @nn.compact
    def __call__(self, x, masks, positions, queries, deterministic):
        config, local = self.config, self.number in self.config.local_layers
        self_attention = SelfAttention(config, local, name="attention")

        def drop(y):
            return nn.Dropout(config.dropout)(y, deterministic=deterministic)

        def mlp(y):
            def project(name, features):
                return nn.Dense(features, use_bias=config.use_bias, name=name)

            hidden = ACTIVATIONS[config.activation](project("up", config.intermediate_size)(y))
            if config.gated_mlp:
                hidden = hidden * project("gate", config.intermediate_size)(y)
            return project("down", config.hidden_size)(hidden)

        mask = masks[int(local)]
        if config.pre_norm:
            skips_norm = self.number == 0 and not config.first_norm
            normed = x if skips_norm else _norm(config, "attention_norm")(x)
            x = x[:, :queries] + drop(self_attention(normed, mask, positions, queries))
            return x + drop(mlp(_norm(config, "mlp_norm")(x)))
        attended = drop(self_attention(x, mask, positions, queries))
        x = _norm(config, "attention_norm")(x[:, :queries] + attended)
        return _norm(config, "mlp_norm")(x + drop(mlp(x)))


class Encoder(nn.Module):
    """Encoder from token ids to hidden states.

    Attributes:
      config: the encoder's config.
      first_only: whether the last layer computes the first token alone, which is all that some
        heads read.
    """

    config: EncoderConfig
    first_only: bool = False

    @nn.compact
    @jax.default_matmul_precision("float32")
    def __call__(
        self, tokens: jax.Array, types: jax.Array, valid: jax.Array, deterministic: bool = True
    ) -> jax.Array:
        """Computes hidden states after the last layer.

        Args:
          tokens: int32 `[batch, seq]`.
          types: int32 `[batch, seq]`, 0 on the request and 1 on the response; models without token
            types ignore it.
          valid: bool `[batch, seq]`, False on padding.
          deterministic: False while training (dropout).

        Returns:
          float32 `[batch, seq, hidden_size]`, or `[batch, 1, hidden_size]`.
        """
        config = self.config
        positions = jnp.maximum(jnp.cumsum(valid, axis=-1) - 1, 0)
        x = nn.Embed(config.vocab_size, config.hidden_size, name="word")(tokens)
        if config.rotary_thetas is None:
            places = config.max_length + config.position_offset
            table = nn.Embed(places, config.hidden_size, name="position")
            x = x + table(positions + config.position_offset)
        if config.num_types:
            kinds = types if config.num_types > 1 else jnp.zeros_like(types)
            x = x + nn.Embed(config.num_types, config.hidden_size, name="type")(kinds)
        if config.embedding_norm:
            x = _norm(config, "embedding_norm")(x)
        batch, seq = tokens.shape
        visible = jnp.broadcast_to(valid[:, None, None, :], (batch, 1, seq, seq))
        places = jnp.arange(seq)
        near = jnp.abs(places[:, None] - places[None, :]) <= config.window
        for number in range(config.num_layers):
            layer = EncoderLayer(config, number, name=f"layer_{number}")
            last = number == config.num_layers - 1
            queries = 1 if last and self.first_only else x.shape[1]
            x = layer(x, (visible, visible & near), positions, queries, deterministic)
        return _norm(config, "final_norm")(x) if config.pre_norm else x


class Classifier(nn.Module):
    """Classifier from token ids to class logits: encoder, pooling, head."""

    config: EncoderConfig

    @nn.compact
    @jax.default_matmul_precision("float32")
    def __call__(
        self, tokens: jax.Array, types: jax.Array, valid: jax.Array, deterministic: bool = True
    ) -> jax.Array:
        """Computes class logits, float32 `[batch, num_labels]`; arguments as for `Encoder`."""
        config = self.config
        first_only = config.pooling == "first"
        x = Encoder(config, first_only, name="encoder")(tokens, types, valid, deterministic)
        if first_only:
            pooled = x[:, 0]
        else:
            weight = valid[:, :, None].astype(x.dtype)
            pooled = (x * weight).sum(1) / jnp.maximum(weight.sum(1), 1.0)
        if config.head != "linear":
            bias = config.head == "tanh" or config.head_bias
            pooled = nn.Dense(config.hidden_size, use_bias=bias, name="head_dense")(pooled)
            if config.head == "tanh":
                pooled = jnp.tanh(pooled)
            else:
                pooled = _norm(config, "head_norm")(ACTIVATIONS[config.activation](pooled))
            pooled = nn.Dropout(config.dropout)(pooled, deterministic=deterministic)
        return nn.Dense(config.num_labels, name="head")(pooled)
