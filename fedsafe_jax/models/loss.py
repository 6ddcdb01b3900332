"""Token losses that never hold `[tokens, vocab]` logits."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import custom_vjp_primal_tree_values

from fedsafe_jax.models.by_owner import by_layer, sum_of_owners
from fedsafe_jax.models.decoder import Decoder, divergence, target_nll
from fedsafe_jax.models.flatten_vmap import TARGET_CHUNKS, flatten_vmap
from fedsafe_jax.models.microbatch import MICROBATCH_TOKENS, count_on
from fedsafe_jax.models.sparse_last_layer import weighted_nll

# Tokens whose logits are held at once; few on CPU, where a half-empty chunk costs as a full one.
CHUNK_TOKENS = {"cpu": 128}
DEFAULT_CHUNK_TOKENS = 1024


def token_nll(
    model: Decoder, params: dict, hidden: jax.Array, targets: jax.Array, mask: jax.Array
) -> jax.Array:
    """Returns the negative log-likelihood of each target token, zero where the mask is off.

    Target tokens are moved to the front and taken in chunks, and only the chunks that they fill
    are computed: prompts and padding cost no logits. While the base is frozen, the gradient of a
    chunk is computed along with its loss, so no logits are computed twice. Under `vmap` over
    adapters the tokens of all clients are one sequence, see `flatten_vmap`.

    Args:
      model: the decoder, for its unembedding.
      params: base parameters.
      hidden: `[batch, seq, hidden_size]`.
      targets: int32 `[batch, seq]`.
      mask: float32 or bool `[batch, seq]`, nonzero on target tokens.

    Returns:
      float32 `[batch, seq]`, in nats.
    """
    chunk = _chunk_tokens(model, targets.size)
    flat = hidden.reshape(targets.size, -1), targets.reshape(-1), mask.reshape(-1) != 0
    return _chunked_nll(model, chunk, target_nll)(params, *flat).reshape(targets.shape)


def token_divergence(
    model: Decoder, params: dict, hidden: jax.Array, reference: jax.Array, mask: jax.Array
) -> jax.Array:
    """Returns KL(reference || model) of the next token at each place, zero where the mask is off.

    Chunks, gradients and `vmap` as in `token_nll`; nothing flows into the reference.

    Args:
      model: the decoder, for its unembedding.
      params: base parameters, frozen.
      hidden: `[batch, seq, hidden_size]`.
      reference: `[batch, seq, hidden_size]`, of the same base under other factors.
      mask: float32 or bool `[batch, seq]`, nonzero where it is computed.

    Returns:
      float32 `[batch, seq]`, in nats.
    """
    chunk = _chunk_tokens(model, mask.size)
    flat = (x.reshape(mask.size, -1) for x in (hidden, jax.lax.stop_gradient(reference)))
    is_target = mask.reshape(-1) != 0
    return _chunked_nll(model, chunk, divergence)(params, *flat, is_target).reshape(mask.shape)


def _chunk_tokens(model: Decoder, tokens: int) -> int:
    """Returns how many tokens' logits are held at once."""
    return min(CHUNK_TOKENS.get(model.config.platform, DEFAULT_CHUNK_TOKENS), tokens)


# Cached, so that a model and chunk size have one function, whose traces jax can reuse.
@functools.lru_cache(maxsize=16)
def _chunked_nll(model: Decoder, chunk: int, of_chunk: Callable) -> Callable:
    """Returns the differentiable loss of a flat sequence of tokens.

    Args:
      model: the decoder, for its unembedding.
      chunk: tokens of a chunk.
      of_chunk: `(model, params, hidden, targets) -> float32 [tokens]`, such as `target_nll`; with
        every logit held.

    Returns:
      `(params, hidden [tokens, hidden_size], targets [tokens, ...], is_target bool [tokens])
      -> loss float32 [tokens]`.
    """
    chunk_nll = functools.partial(of_chunk, model)
    value = functools.partial(_nll, chunk_nll, chunk)
    value_and_gradient = functools.partial(_nll_and_gradient, chunk_nll, chunk)
    trainable = functools.partial(_nll_of_trainable_base, chunk_nll, chunk)
    nll = jax.custom_vjp(flatten_vmap(value, num_shared=1))
    forward = functools.partial(
        _nll_forward, flatten_vmap(value_and_gradient, num_shared=1), trainable
    )
    nll.defvjp(forward, _nll_backward, symbolic_zeros=True)
    return nll


def _targets_first(chunk: int, hidden, targets, is_target):
    """Sorts tokens so that targets come first, and pads them to whole chunks.

    Args:
      chunk: tokens of a chunk.
      hidden, targets, is_target: as in `_chunked_nll`.

    Returns:
      `(hidden [padded, hidden_size], targets [padded], order int32 [padded])`, where `order` is
      the index that each token came from; an index of at least `tokens` is padding.
    """
    order = jnp.argsort(~jnp.pad(is_target, (0, -is_target.size % chunk)), stable=True)
    source = jnp.minimum(order, is_target.size - 1)
    return hidden[source], targets[source], order


def _restore_order(values, order, is_target):
    """Undoes `_targets_first`: `values [padded, ...]` to `[tokens, ...]`, zero off target."""
    restored = jnp.zeros_like(values).at[order].set(values)[: is_target.size]
    return jnp.where(is_target.reshape(-1, *[1] * (values.ndim - 1)), restored, 0)


def _nll(chunk_nll: Callable, chunk: int, params, hidden, targets, is_target):
    """Computes the loss alone, without anything for a gradient; shapes as in `_chunked_nll`."""
    hidden, targets, order = _targets_first(chunk, hidden, targets, is_target)

    def add_chunk(i, nll):
        part, target = (
            jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk) for x in (hidden, targets)
        )
        return jax.lax.dynamic_update_slice_in_dim(
            nll, chunk_nll(params, part, target), i * chunk, 0
        )

    num_chunks = -(-is_target.sum() // chunk)
    # Named, as its trips are data: who reads the compiled program must be told them (`aot.hlo`).
    with jax.named_scope(TARGET_CHUNKS):
        nll = jax.lax.fori_loop(0, num_chunks, add_chunk, jnp.zeros(order.size))
    return _restore_order(nll, order, is_target)


def _nll_and_gradient(chunk_nll: Callable, chunk: int, params, hidden, targets, is_target):
    """Computes the loss and, chunk by chunk, its gradient; shapes as in `_chunked_nll`.

    Returns:
      `(nll [tokens], gradient [tokens, hidden_size])`: a token's loss depends on its own hidden
      state alone, so this is the whole Jacobian.
    """
    hidden, targets, order = _targets_first(chunk, hidden, targets, is_target)

    def add_chunk(i, results):
        part, target = (
            jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk) for x in (hidden, targets)
        )
        nll, pull_back = jax.vjp(lambda x: chunk_nll(params, x, target), part)
        new = nll, *pull_back(jnp.ones_like(nll))
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(x, y, i * chunk, 0)
            for x, y in zip(results, new, strict=True)
        )

    num_chunks = -(-is_target.sum() // chunk)
    zeros = jnp.zeros(order.size), jnp.zeros_like(hidden)
    with jax.named_scope(TARGET_CHUNKS):
        results = jax.lax.fori_loop(0, num_chunks, add_chunk, zeros)
    return tuple(_restore_order(x, order, is_target) for x in results)


def _nll_of_trainable_base(chunk_nll: Callable, chunk: int, params, hidden, targets, is_target):
    """Computes the loss so that jax can differentiate it with respect to the base as well.

    Each chunk is checkpointed and its logits are recomputed in the backward pass. `lax.map` over
    all chunks, as reverse mode has no loop whose length is data; unfilled chunks are skipped.
    Shapes as in `_chunked_nll`.
    """
    hidden, targets, order = _targets_first(chunk, hidden, targets, is_target)
    is_filled = jnp.arange(0, order.size, chunk) < is_target.sum()

    def one_chunk(inputs):
        hidden, targets, is_filled = inputs
        return jax.lax.cond(
            is_filled,
            jax.checkpoint(functools.partial(chunk_nll, params)),
            lambda hidden, _: jnp.zeros_like(hidden[:, 0], jnp.float32),
            hidden, targets,
        )  # fmt: skip

    hidden, targets = (x.reshape(-1, chunk, *x.shape[1:]) for x in (hidden, targets))
    chunks = hidden, targets, is_filled
    return _restore_order(jax.lax.map(one_chunk, chunks).reshape(-1), order, is_target)


def _nll_forward(value_and_gradient: Callable, trainable: Callable, *inputs):
    """Forward rule: keeps the gradient where the base is frozen, else the pull-back function.

    Args:
      value_and_gradient: `_nll_and_gradient` of a model.
      trainable: `_nll_of_trainable_base` of the same model.
      *inputs: as in `_chunked_nll`, each leaf with `perturbed`: whether it is differentiated.
    """
    is_trainable = any(x.perturbed for x in jax.tree.leaves(inputs[0]))
    params, hidden, targets, is_target = custom_vjp_primal_tree_values(inputs)
    if is_trainable:
        return jax.vjp(lambda p, h: trainable(p, h, targets, is_target), params, hidden)
    return value_and_gradient(params, hidden, targets, is_target)


def _nll_backward(kept, cotangent):
    """Backward rule: `kept` is what `_nll_forward` kept, `cotangent` is float32 `[tokens]`."""
    if isinstance(kept, jax.Array):
        return None, (cotangent[:, None] * kept).astype(kept.dtype), None, None
    return *kept(cotangent), None, None


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the mean of `values * mask` where `mask` is on, and 0 when it is off everywhere.

    A mean by weight would divide by the sum of the weights, and a batch whose weights are all the
    same would not be weighed at all; divided by the number of values, it counts that much less.

    Args:
      values: float32, any shape.
      mask: float32 or bool of that shape: weights, 0 where a value is left out.
    """
    return jnp.sum(values * mask) / jnp.maximum(count_on(mask), 1)


def packed_loss(model: Decoder, factors: dict, base: dict, batch: Any) -> jax.Array:
    """Returns the mean negative log-likelihood, in nats, over the target tokens of packed rows.

    Each token's is times its weight in `batch.mask`; tokens count alike (see `masked_mean`).

    On CPU, for a batch of at most one microbatch (`models.microbatch`), the last layer is computed
    for target tokens alone (`models.sparse_last_layer`).

    Args:
      model: the decoder.
      factors: LoRA factors.
      base: frozen base parameters.
      batch: `data.packing.Batch` with fields `[rows, seq]`; of a `NoisyBatch` the adapter's inputs
        have dropout, at the model's `lora_dropout`.

    Returns:
      float32 scalar.
    """
    rows, seq = batch.mask.shape
    is_cpu = model.config.platform == "cpu"
    if is_cpu and rows * seq <= max(seq, MICROBATCH_TOKENS["cpu"]):
        weights = batch.mask / jnp.maximum(count_on(batch.mask), 1)
        return weighted_nll(model, factors, base, batch=batch, weights=weights)
    return masked_mean(packed_nll(model, factors, base, batch), batch.mask)


def packed_nll(
    model: Decoder, factors: dict, base: dict, batch: Any, owner: jax.Array | None = None
) -> jax.Array:
    """Returns the negative log-likelihood of packed rows' targets, float32 `[rows, seq]`, in nats.

    Args:
      model, factors, base, batch, owner: as for `packed_hidden`.
    """
    hidden = packed_hidden(model, factors, base, batch, owner=owner)
    return token_nll(model, base, hidden, batch.targets, batch.mask)


def packed_hidden(
    model: Decoder, factors: dict | None, base: dict, batch: Any, owner: jax.Array | None = None
) -> jax.Array:
    """Returns the last hidden states of packed rows, `[rows, seq, hidden_size]`.

    Args:
      model: the decoder.
      factors: LoRA factors; with `owner` they lead with `[layers, clients]`. None for the base.
      base: base parameters.
      batch: `data.packing.Batch` with fields `[rows, seq]`; of a `NoisyBatch` the adapter's inputs
        have dropout, at the model's `lora_dropout`.
      owner: int32 `[rows]`, the client of each row; None where all have the same factors.
    """
    variables = {"params": base} | ({} if factors is None else {"lora": factors})
    noise = getattr(batch, "noise", None)
    rows = batch.tokens, batch.positions, batch.segment_ids
    return model.apply(variables, *rows, noise=noise, owner=owner)[0]


class PackedLoss(NamedTuple):
    """The loss of packed rows, of one client and of the rows of many.

    Attributes:
      model: the decoder.
    """

    model: Decoder

    @property
    def dtype(self) -> str:
        """Dtype that factors are rounded to where they meet rows."""
        return self.model.config.dtype

    def __call__(self, factors: dict, base: dict, batch: Any) -> jax.Array:
        """Returns `packed_loss`."""
        return packed_loss(self.model, factors, base, batch)

    def by_owner(
        self, factors: dict, base: dict, batch: Any, owner: jax.Array, targets: jax.Array
    ) -> jax.Array:
        """Returns what rows of many clients add to the `packed_loss` of each.

        Args:
          factors: LoRA factors with a leading `[clients]`.
          base: frozen base parameters.
          batch: `data.packing.Batch` with fields `[rows, seq]`: rows of any client, in any order.
          owner: int32 `[rows]`, the client of each row.
          targets: float32 `[clients]`, target tokens of a client in all of its rows, here or not.

        Returns:
          float32 `[clients]`; summed over all rows of a client it is its loss.
        """
        nll = packed_nll(self.model, by_layer(factors), base, batch, owner)
        return sum_of_owners(nll, batch.mask, owner, targets)


def packed_divergence(
    model: Decoder, reference: dict | None, factors: dict, base: dict, batch: Any
) -> jax.Array:
    """Returns the mean KL(reference || model), in nats, at the places that predict target tokens.

    Args:
      model: the decoder.
      reference: LoRA factors that the model is held to; None for the base alone.
      factors: LoRA factors.
      base: frozen base parameters.
      batch: `data.packing.Batch` with fields `[rows, seq]`.

    Returns:
      float32 scalar.
    """
    hidden = packed_hidden(model, factors, base, batch)
    fixed = packed_hidden(model, reference, base, batch)
    return masked_mean(token_divergence(model, base, hidden, fixed, batch.mask), batch.mask)
