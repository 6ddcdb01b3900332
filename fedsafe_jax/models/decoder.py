"""The decoder of every supported family: one Flax linen module, scanned over stacked layers.

Parameters mirror Hugging Face names (`layers/self_attn/q_proj/kernel`), with every per-layer leaf
stacked on a leading `[layers]` axis. LoRA factors live in a separate `lora` collection of the same
structure, so `model.apply({"params": base, "lora": factors}, ...)` can be vmapped over the factors
alone while the base is shared (see `flatten_vmap`). `DecoderConfig` holds what differs between
families.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from fedsafe_jax import random_streams
from fedsafe_jax.models import attention, dropout, rotary
from fedsafe_jax.models.cache import KVCache
from fedsafe_jax.models.decoder_config import DecoderConfig
from fedsafe_jax.models.decoder_layer import Layer, LayerKind, RMSNorm, layer_kinds
from fedsafe_jax.models.precision import own_precision
from fedsafe_jax.models.rotary import Rotation
from fedsafe_jax.models.visibility import Visibility
from fedsafe_jax.random_streams import Purpose


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
            in_axes=(0, *[nn.broadcast] * 5),
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
        owner: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Computes hidden states after the final norm.

        Args:
          tokens: int32 `[batch, seq]`, or float `[batch, seq, vocab]`, see `embed`.
          positions: int32 `[batch, seq]`, counted within each example.
          segment_ids: int32 `[batch, seq]`, 0 for padding; with a cache only for packed rows that
            fill an empty cache of their length.
          cache: a `KVCache` to read and extend, or None.
          valid: bool `[batch, seq]`, with a cache: which of `tokens` are real (left padding is
            not).
          noise: uint32 `[batch, seq]`, from which dropout of the adapter's inputs is drawn while
            it is trained, without a cache; None for no dropout.
          owner: int32 `[batch]`, the client of each row, where the factors are those of several
            clients, `[layers, clients, ...]`, without a cache; None for one adapter.

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
            (x, cache), _ = self.layers(
                (x, cache), kinds, rotation, masks_or_segments, None, drop, owner
            )
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
        """Returns the first layer's input, `[..., hidden_size]`.

        Args:
          tokens: int32 `[...]`, or float `[..., vocab]`, weights of all tokens, such as one-hot
            rows, through which a gradient by tokens is taken.
        """
        table = self.embed_tokens
        if jnp.issubdtype(tokens.dtype, jnp.floating):
            x = jnp.dot(tokens.astype(self.config.dtype), table.astype(self.config.dtype))
        else:
            x = table[tokens].astype(self.config.dtype)
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


def divergence(model: Decoder, params: dict, hidden: jax.Array, reference: jax.Array) -> jax.Array:
    """Returns KL(reference || model) of the next token; every logit of both is held.

    Args:
      model: the decoder, for its unembedding.
      params: base parameters.
      hidden, reference: `[tokens, hidden_size]`.

    Returns:
      float32 `[tokens]`, in nats.
    """
    ours, theirs = (
        jax.nn.log_softmax(model.apply({"params": params}, x, method="unembed"))
        for x in (hidden, reference)
    )
    return optax.losses.kl_divergence_with_log_targets(ours, theirs)


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
