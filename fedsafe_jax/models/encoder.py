"""A bidirectional transformer encoder with a classification head."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Shape of the encoder; hashable."""

    vocab_size: int
    hidden_size: int = 128
    num_layers: int = 2
    num_heads: int = 4
    max_length: int = 128
    num_labels: int = 2
    dropout: float = 0.1


class EncoderLayer(nn.Module):
    config: EncoderConfig

    @nn.compact
    def __call__(self, x, mask, deterministic):
        config = self.config
        normed = nn.LayerNorm()(x)
        attended = nn.MultiHeadDotProductAttention(config.num_heads)(normed, mask=mask)
        x = x + nn.Dropout(config.dropout)(attended, deterministic=deterministic)
        hidden = nn.gelu(nn.Dense(4 * config.hidden_size)(nn.LayerNorm()(x)))
        hidden = nn.Dense(config.hidden_size)(hidden)
        return x + nn.Dropout(config.dropout)(hidden, deterministic=deterministic)


class Classifier(nn.Module):
    """Token ids to class logits: embed, encode, mean over real tokens, one linear head."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, tokens, segments, valid, deterministic=True):
        """Class logits.

        Args:
          tokens: int32 `[batch, seq]`.
          segments: int32 `[batch, seq]`, 0 on the request and 1 on the response.
          valid: bool `[batch, seq]`.
          deterministic: False while training (dropout).

        Returns:
          float32 `[batch, num_labels]`.
        """
        config = self.config
        positions = jnp.arange(tokens.shape[1])
        x = nn.Embed(config.vocab_size, config.hidden_size, name="word")(tokens)
        x = x + nn.Embed(config.max_length, config.hidden_size, name="position")(positions)
        x = x + nn.Embed(2, config.hidden_size, name="segment")(segments)
        mask = valid[:, None, None, :]
        for i in range(config.num_layers):
            x = EncoderLayer(config, name=f"layer_{i}")(x, mask, deterministic)
        x = nn.LayerNorm(name="final_norm")(x)
        weight = valid[:, :, None].astype(x.dtype)
        pooled = (x * weight).sum(1) / jnp.maximum(weight.sum(1), 1.0)
        return nn.Dense(config.num_labels, name="head")(pooled)
