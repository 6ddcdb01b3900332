"""Key-value cache of generation, in two layouts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fedsafe_jax.models.decoder_config import PROJECTIONS, DecoderConfig

# On CPU, decoders with at most this many layers, and this many weights in them, are unrolled while
# generating. Larger ones are not: each layer is compiled separately, and weights are held twice.
UNROLLED_LAYERS, UNROLLED_WEIGHTS = 16, 200_000_000


class KVCache(NamedTuple):
    """Keys and values of the tokens that were read so far.

    The stacked layout is one array for all layers. On CPU and for few layers the decoder is
    unrolled, and the layout is a tuple of one array per layer, keys with `head_dim` before
    `cache_len`: slicing a layer out of a stacked cache copies it on CPU, and products with keys in
    this layout take half the time.

    Attributes:
      key, value: `[layers, batch, kv_heads, cache_len, head_dim]`; unrolled, a tuple of keys
        `[batch, kv_heads, head_dim, cache_len]` and one of values `[batch, kv_heads, cache_len,
        head_dim]`.
      valid: bool `[batch, cache_len]`, False on left padding.
      length: int32 scalar, number of slots written so far, the same for every row.
    """

    key: jax.Array | tuple[jax.Array, ...]
    value: jax.Array | tuple[jax.Array, ...]
    valid: jax.Array
    length: jax.Array


def unrolls(config: DecoderConfig) -> bool:
    """Returns whether generation unrolls the layers, see `KVCache`."""
    names = [name for group in PROJECTIONS.values() for name in group]
    per_layer = sum(fan_in * fan_out for fan_in, fan_out in map(config.projection_shape, names))
    is_shallow = config.num_layers <= UNROLLED_LAYERS
    is_small = config.num_layers * per_layer <= UNROLLED_WEIGHTS
    return is_shallow and is_small and config.platform == "cpu"


def unstack(variables: dict, num_layers: int, axis: int = 0) -> dict:
    """Lays out parameters or LoRA factors for an unrolled decoder.

    Layers become separate, `layers/0/...`, `layers/1/...`, and a tied output matrix is transposed
    once.

    Args:
      variables: pytree with stacked layers.
      num_layers: number of layers.
      axis: axis that the layers are stacked on.
    """
    index = (slice(None),) * axis
    separate = {
        str(i): jax.tree.map(lambda leaf, i=i: leaf[(*index, i)], variables["layers"])
        for i in range(num_layers)
    }
    new = {"layers": separate}
    if "embed_tokens" in variables and "lm_head" not in variables:
        new["lm_head"] = variables["embed_tokens"].T
    # Without the barrier XLA would move the copies into the loop over tokens.
    return variables | jax.lax.optimization_barrier(new)


def empty_cache(config: DecoderConfig, batch: int, cache_len: int) -> KVCache:
    """Returns an empty cache of `cache_len` slots, in the stacked layout."""
    shape = (config.num_layers, batch, config.num_kv_heads, cache_len, config.head_dim)
    zeros, valid = jnp.zeros(shape, config.dtype), jnp.zeros((batch, cache_len), bool)
    return KVCache(zeros, zeros, valid, jnp.zeros((), jnp.int32))


def grow_cache(cache: KVCache, cache_len: int) -> KVCache:
    """Returns a cache of the same content with room for `cache_len` slots."""

    def widen(x, axis):
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, cache_len - x.shape[axis])
        return jnp.pad(x, padding)

    key_axis = -1 if isinstance(cache.key, tuple) else -2
    return KVCache(
        jax.tree.map(lambda x: widen(x, key_axis), cache.key),
        jax.tree.map(lambda x: widen(x, -2), cache.value),
        widen(cache.valid, -1),
        cache.length,
    )


def spread_cache(
    config: DecoderConfig, cache: KVCache, source: jax.Array, valid: jax.Array, length: ArrayLike
) -> KVCache:
    """Spreads the cache of packed prompts over rows of one prompt each, as generation needs it.

    Args:
      config: the decoder's config, which says whether generation unrolls.
      cache: full cache of packed rows `[packed_rows, seq]`, in the stacked layout.
      source: int32 `[rows, cache_len]`, flat index in the packed rows of each slot's token.
      valid: bool `[rows, cache_len]`, False where a slot has no token.
      length: int32 scalar, slots written, the same for every row.

    Returns:
      A cache `[rows, cache_len]`, in the unrolled layout where generation unrolls.
    """

    def take(x):  # [layers, packed_rows, kv_heads, seq, head_dim]
        x = x.swapaxes(2, 3)
        x = x.reshape(x.shape[0], -1, *x.shape[3:])
        return x[:, source].swapaxes(2, 3)

    key, value = take(cache.key), take(cache.value)
    if unrolls(config):
        key, value = tuple(key.swapaxes(-1, -2)), tuple(value)
    return KVCache(key, value, valid, length)


def write_cache(
    cache: KVCache, layer: ArrayLike, key: jax.Array, value: jax.Array
) -> tuple[KVCache, jax.Array, jax.Array]:
    """Writes a layer's new keys and values behind those that the cache has.

    Args:
      cache: cache of all layers, or of one layer alone where the decoder is unrolled.
      layer: int32 scalar, index of the layer in a cache of all.
      key, value: new ones, `[batch, kv_heads, seq, head_dim]`.

    Returns:
      `(cache, all keys, all values)`, the last two of this layer, `[batch, kv_heads, cache_len,
      head_dim]`.
    """
    if cache.value.ndim == 4:
        key = jax.lax.dynamic_update_slice(cache.key, key.swapaxes(-1, -2), (0, 0, 0, cache.length))
        value = jax.lax.dynamic_update_slice(cache.value, value, (0, 0, cache.length, 0))
        return cache._replace(key=key, value=value), key.swapaxes(-1, -2), value
    start = (layer, 0, 0, cache.length, 0)
    key = jax.lax.dynamic_update_slice(cache.key, key[None], start)
    value = jax.lax.dynamic_update_slice(cache.value, value[None], start)
    of_layer = [jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (key, value)]
    return cache._replace(key=key, value=value), *of_layer
