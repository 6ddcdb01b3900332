"""Token losses that never hold `[tokens, vocab]` logits."""

import jax
import jax.numpy as jnp

from fedsafe_jax.models.decoder import Decoder

CHUNK_TOKENS = 1024


def token_nll(model: Decoder, params, hidden, targets, mask) -> jax.Array:
    """Negative log-likelihood of each target token, zero where the mask is off.

    Targets are gathered to the front and taken in chunks whose logits are recomputed in the
    backward pass; a chunk without any target is skipped, so prompts and padding cost no logits
    (under `vmap` the skip becomes a select and every chunk is computed).

    Args:
      model: the decoder, for its unembedding.
      params: base parameters.
      hidden: `[batch, seq, hidden_size]`.
      targets: int32 `[batch, seq]`.
      mask: float32 or bool `[batch, seq]`, nonzero on target tokens.

    Returns:
      float32 `[batch, seq]`, in nats.
    """
    tokens = targets.size
    chunk = min(CHUNK_TOKENS, tokens)
    padding = -tokens % chunk
    on = jnp.pad(mask.reshape(-1) != 0, (0, padding))
    order = jnp.argsort(~on, stable=True)  # tokens with a target come first
    # Padding rows may name any token: their mask is off.
    source = jnp.minimum(order, tokens - 1)
    flat_hidden = hidden.reshape(tokens, -1)[source].reshape(-1, chunk, hidden.shape[-1])
    flat_targets = targets.reshape(-1)[source].reshape(-1, chunk)
    flat_on = on[order].reshape(-1, chunk)

    @jax.checkpoint
    def chunk_nll(h, target):
        logits = model.apply({"params": params}, h, method="unembed")
        chosen = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen

    def one_chunk(inputs):
        h, target, used = inputs
        return jax.lax.cond(
            used.any(), chunk_nll, lambda h, t: jnp.zeros_like(h[:, 0], jnp.float32), h, target
        )

    sorted_nll = jax.lax.map(one_chunk, (flat_hidden, flat_targets, flat_on)).reshape(-1)
    nll = jnp.zeros_like(sorted_nll).at[order].set(sorted_nll)[:tokens]
    return jnp.where(mask != 0, nll.reshape(targets.shape), 0.0)


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of `values` where `mask` is on; 0 when it is nowhere on."""
    return jnp.sum(values * mask) / jnp.maximum(jnp.sum(mask), 1)


def packed_loss(model: Decoder, adapter, base, batch) -> jax.Array:
    """Mean negative log-likelihood, in nats, over the learned tokens of packed rows.

    Args:
      model: the decoder.
      adapter: LoRA factors.
      base: frozen base parameters.
      batch: `data.packing.Batch` with fields `[rows, seq]`.
    """
    hidden, _ = model.apply(
        {"params": base, "lora": adapter}, batch.tokens, batch.positions, batch.segment_ids
    )
    nll = token_nll(model, base, hidden, batch.targets, batch.mask)
    return masked_mean(nll, batch.mask)
