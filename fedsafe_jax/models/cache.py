"""The key-value cache of generation, in two layouts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedsafe_jax.models.decoder_config import PROJECTIONS, DecoderConfig

# On CPU, decoders of at most so many layers and weights in them are unrolled while generating: the
# layers are compiled one by one, and their weights held twice.
UNROLLED_LAYERS, UNROLLED_WEIGHTS = 16, 200_000_000


class KVCache(NamedTuple):
    """Keys and values of what was read so far.

    Stacked, `[layers, batch, kv_heads, cache_len, head_dim]`; but on CPU and for few layers tuples
    of an array a layer, keys with `head_dim` before `cache_len`. The decoder is then unrolled:
    slicing a layer out of a stacked cache copies it there, and products with keys laid out so take
    half the time.
    """

    key: jax.Array | tuple[jax.Array, ...]
    value: jax.Array | tuple[jax.Array, ...]
    valid: jax.Array  # bool [batch, cache_len]; False on left padding
    length: jax.Array  # int32 scalar: slots written so far, the same for every row


def unrolls(config: DecoderConfig) -> bool:
    """Whether generation unrolls the layers, see `KVCache`."""
    names = [name for group in PROJECTIONS.values() for name in group]
    a_layer = sum(fan_in * fan_out for fan_in, fan_out in map(config.projection_shape, names))
    small = config.num_layers <= UNROLLED_LAYERS and config.num_layers * a_layer <= UNROLLED_WEIGHTS
    return small and jax.default_backend() == "cpu"


def unstack(variables, num_layers: int, axis: int = 0):
    """Parameters or LoRA factors laid out for an unrolled decoder.

    Layers lie apart, `layers/0/...`, `layers/1/...`, and a tied output matrix is transposed once.

    Args:
      variables: with stacked layers.
      num_layers: their number.
      axis: that the layers are stacked on.
    """
    index = (slice(None),) * axis
    apart = {
        str(i): jax.tree.map(lambda leaf, i=i: leaf[(*index, i)], variables["layers"])
        for i in range(num_layers)
    }
    new = {"layers": apart}
    if "embed_tokens" in variables and "lm_head" not in variables:
        new["lm_head"] = variables["embed_tokens"].T
    # Without the barrier XLA would move the copies into the loop over tokens.
    return variables | jax.lax.optimization_barrier(new)


def empty_cache(config: DecoderConfig, batch: int, cache_len: int) -> KVCache:
    """A stacked cache of `cache_len` slots."""
    shape = (config.num_layers, batch, config.num_kv_heads, cache_len, config.head_dim)
    store, valid = jnp.zeros(shape, config.dtype), jnp.zeros((batch, cache_len), bool)
    return KVCache(store, store, valid, jnp.zeros((), jnp.int32))


def grow_cache(cache: KVCache, cache_len: int) -> KVCache:
    """The same content with room for `cache_len` slots."""

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
    config: DecoderConfig, cache: KVCache, source: jax.Array, valid: jax.Array, length
) -> KVCache:
    """The cache of rows that end in the same slot, in the form that generation goes on with.

    Args:
      config: says whether generation unrolls.
      cache: of packed rows `[packed_rows, seq]`, stacked and full.
      source: int32 `[rows, cache_len]`, flat positions in the packed rows.
      valid: bool `[rows, cache_len]`, False where nothing was read.
      length: int32 scalar, slots written.
    """

    def take(x):  # [layers, packed_rows, kv_heads, seq, head_dim]
        x = x.swapaxes(2, 3)
        x = x.reshape(x.shape[0], -1, *x.shape[3:])
        return x[:, source].swapaxes(2, 3)

    key, value = take(cache.key), take(cache.value)
    if unrolls(config):
        key, value = tuple(key.swapaxes(-1, -2)), tuple(value)
    return KVCache(key, value, valid, length)


def write_cache(cache: KVCache, number, key, value):
    """Writes keys and values `[batch, kv_heads, seq, head_dim]` of a layer behind what is there.

    Args:
      cache: of all layers, or of the layer alone where the decoder is unrolled.
      number: of the layer.
      key, value: new ones.

    Returns:
      `(cache, all keys, all values)`, of this layer.
    """
    if cache.value.ndim == 4:
        key = jax.lax.dynamic_update_slice(cache.key, key.swapaxes(-1, -2), (0, 0, 0, cache.length))
        value = jax.lax.dynamic_update_slice(cache.value, value, (0, 0, cache.length, 0))
        return cache._replace(key=key, value=value), key.swapaxes(-1, -2), value
    start = (number, 0, 0, cache.length, 0)
    key = jax.lax.dynamic_update_slice(cache.key, key[None], start)
    value = jax.lax.dynamic_update_slice(cache.value, value[None], start)
    mine = [jax.lax.dynamic_index_in_dim(x, number, keepdims=False) for x in (key, value)]
    return cache._replace(key=key, value=value), *mine
