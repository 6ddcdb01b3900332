"""Token losses that never hold `[tokens, vocab]` logits."""

import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import custom_vjp_primal_tree_values

from fedsafe_jax.models.decoder import Decoder, target_nll
from fedsafe_jax.models.flatten_vmap import flatten_vmap
from fedsafe_jax.models.microbatch import MICROBATCH_TOKENS
from fedsafe_jax.models.sparse_last_layer import weighted_nll

# Tokens whose logits are held at once; few on CPU, where a half-empty chunk costs as a full one.
CHUNK_TOKENS = {"cpu": 128}
DEFAULT_CHUNK_TOKENS = 1024


def token_nll(model: Decoder, params, hidden, targets, mask) -> jax.Array:
    """Negative log-likelihood of each target token, zero where the mask is off.

    Targets are gathered to the front and taken in chunks, as many as they fill: prompts and padding
    cost no logits. While the base is frozen, a chunk's gradient is taken along with its loss, so no
    logits are computed twice; `vmap` over adapters puts all clients' targets into one line.

    Args:
      model: the decoder, for its unembedding.
      params: base parameters.
      hidden: `[batch, seq, hidden_size]`.
      targets: int32 `[batch, seq]`.
      mask: float32 or bool `[batch, seq]`, nonzero on target tokens.

    Returns:
      float32 `[batch, seq]`, in nats.
    """
    chunk = min(CHUNK_TOKENS.get(jax.default_backend(), DEFAULT_CHUNK_TOKENS), targets.size)
    flat = hidden.reshape(targets.size, -1), targets.reshape(-1), mask.reshape(-1) != 0
    return _nll_of(model, chunk)(params, *flat).reshape(targets.shape)


@functools.lru_cache(maxsize=16)
def _nll_of(model: Decoder, chunk: int):
    """`(params, hidden [tokens, hidden_size], targets [tokens], on [tokens]) -> nll [tokens]`."""

    chunk_nll = functools.partial(target_nll, model)

    def in_front(hidden, targets, on):
        """Tokens in whole chunks, targets first, and where each came from."""
        order = jnp.argsort(~jnp.pad(on, (0, -on.size % chunk)), stable=True)
        source = jnp.minimum(order, on.size - 1)
        return hidden[source], targets[source], order

    def put_back(values, order, on):
        back = jnp.zeros_like(values).at[order].set(values)[: on.size]
        return jnp.where(on.reshape(-1, *[1] * (values.ndim - 1)), back, 0)

    def loss_alone(params, hidden, targets, on):
        h, target, order = in_front(hidden, targets, on)

        def body(i, nll):
            part, chosen = (jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk) for x in (h, target))
            return jax.lax.dynamic_update_slice_in_dim(
                nll, chunk_nll(params, part, chosen), i * chunk, 0
            )

        used = -(-on.sum() // chunk)
        nll = jax.lax.fori_loop(0, used, body, jnp.zeros(order.size))
        return put_back(nll, order, on)

    def loss_and_gradient(params, hidden, targets, on):
        h, target, order = in_front(hidden, targets, on)

        def body(i, found):
            part, chosen = (jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk) for x in (h, target))
            nll, pull = jax.vjp(lambda x: chunk_nll(params, x, chosen), part)
            new = nll, *pull(jnp.ones_like(nll))  # a token's loss depends on its own state alone
            return tuple(
                jax.lax.dynamic_update_slice_in_dim(x, y, i * chunk, 0)
                for x, y in zip(found, new, strict=True)
            )

        used = -(-on.sum() // chunk)
        found = jax.lax.fori_loop(0, used, body, (jnp.zeros(order.size), jnp.zeros_like(h)))
        return tuple(put_back(x, order, on) for x in found)

    def trained_head(params, hidden, targets, on):
        """The same for a base that learns: chunks whose logits are computed again backwards."""
        h, target, order = in_front(hidden, targets, on)
        used = jnp.arange(0, order.size, chunk) < on.sum()

        def one_chunk(inputs):
            h, target, used = inputs
            return jax.lax.cond(
                used,
                jax.checkpoint(functools.partial(chunk_nll, params)),
                lambda h, t: jnp.zeros_like(h[:, 0], jnp.float32),
                h, target,
            )  # fmt: skip

        chunks = (h.reshape(-1, chunk, h.shape[-1]), target.reshape(-1, chunk), used)
        return put_back(jax.lax.map(one_chunk, chunks).reshape(-1), order, on)

    alone, with_gradient = (flatten_vmap(f, num_shared=1) for f in (loss_alone, loss_and_gradient))

    def forward(*inputs):
        learns = any(x.perturbed for x in jax.tree.leaves(inputs[0]))
        params, hidden, targets, on = custom_vjp_primal_tree_values(inputs)
        if learns:
            return jax.vjp(lambda p, h: trained_head(p, h, targets, on), params, hidden)
        return with_gradient(params, hidden, targets, on)

    def backward(kept, grad):
        if isinstance(kept, jax.Array):
            return None, (grad[:, None] * kept).astype(kept.dtype), None, None
        return *kept(grad), None, None

    nll = jax.custom_vjp(alone)
    nll.defvjp(forward, backward, symbolic_zeros=True)
    return nll


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of `values` where `mask` is on; 0 when it is nowhere on."""
    return jnp.sum(values * mask) / jnp.maximum(jnp.sum(mask), 1)


def packed_loss(model: Decoder, adapter, base, batch) -> jax.Array:
    """Mean negative log-likelihood, in nats, over the learned tokens of packed rows.

    On CPU, of no more tokens than a pass has (`models.microbatch`), the last layer is computed for
    learned tokens alone.

    Args:
      model: the decoder.
      adapter: LoRA factors.
      base: frozen base parameters.
      batch: `data.packing.Batch` with fields `[rows, seq]`.
    """
    rows, seq = batch.mask.shape
    if jax.default_backend() == "cpu" and rows * seq <= max(seq, MICROBATCH_TOKENS["cpu"]):
        weights = batch.mask / jnp.maximum(jnp.sum(batch.mask), 1)
        return weighted_nll(model, adapter, base, batch, weights)
    hidden, _ = model.apply(
        {"params": base, "lora": adapter}, batch.tokens, batch.positions, batch.segment_ids
    )
    nll = token_nll(model, base, hidden, batch.targets, batch.mask)
    return masked_mean(nll, batch.mask)
