"""Attention of the decoder: the choice of backend, and XLA's own form."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fedsafe_jax.models import attention_kernels as kernels
from fedsafe_jax.models import block_attention
from fedsafe_jax.models.decoder_config import DecoderConfig, ModelError
from fedsafe_jax.models.visibility import Visibility

BACKENDS = ("auto", "xla", "blocks", *kernels.KERNELS)
# Kernels that `auto` tries, by platform. Triton's comes first, as jax compiles it whole and its
# numbers can be checked without a GPU; cuDNN's bias serves windows and large heads.
PREFERENCE = {"gpu": ("triton", "cudnn"), "tpu": ("splash",)}
SPLASH_HEAD = 256  # largest head
# On accelerators, XLA takes rows longer than `LONG_ROW` in parts of `PART` queries.
LONG_ROW, PART = 1024, 512


def refusal(backend: str, config: DecoderConfig, seq: int) -> str:
    """Returns why a backend cannot compute a model's attention, in a few words; "" if it can.

    Args:
      backend: one of `BACKENDS` without `auto`.
      config: the decoder's config, with the devices that compute.
      seq: length of the rows.
    """
    if backend not in kernels.KERNELS:
        return ""
    needs, most = ("tpu", SPLASH_HEAD) if backend == "splash" else ("gpu", kernels.CUDNN_HEAD)
    if backend == "triton":
        most = kernels.TRITON_HEAD
    if config.platform != needs:
        return f"it is a kernel for {needs.upper()}, and the devices are {config.platform}"
    if config.head_dim > most or config.head_dim % 8:
        return f"heads have {config.head_dim} numbers, and it takes a multiple of 8 up to {most}"
    if needs == "gpu" and jnp.dtype(config.dtype).itemsize != 2:
        return f"it computes in bfloat16, and the model in {config.dtype}"
    if needs == "gpu" and config.attention_softcap:
        return "it has no cap of attention logits, which the model has"
    if backend == "triton" and any(window < seq for window in windows(config) if window):
        return "it has no sliding window, which the model has"
    if config.num_kv_heads % config.model_parallel:
        return (
            f"it splits heads over devices, and model_parallel={config.model_parallel} does not "
            f"divide the {config.num_kv_heads} key-value heads"
        )
    return ""


def choose_backend(config: DecoderConfig, q_len: int, kv_len: int) -> str:
    """Returns the backend of a config's attention; for `auto`, the first that can compute it.

    Args:
      config: the decoder's config, with the devices that compute.
      q_len, kv_len: lengths of queries and keys; where they differ, in decoding, XLA is used.

    Raises:
      ModelError: the config asks for a backend that cannot compute its attention, or heads cannot
        be split over its devices.
    """
    wanted = config.attention
    if wanted not in BACKENDS:
        raise ModelError(f"attention '{wanted}': expected one of {', '.join(BACKENDS)}.")
    if wanted != "auto":
        if reason := refusal(wanted, config, q_len):
            raise ModelError(f"attention '{wanted}': {reason}; use auto or xla.")
        return "xla" if q_len != kv_len else wanted
    if config.platform != "cpu" and config.num_kv_heads % config.model_parallel:
        raise ModelError(
            f"model_parallel={config.model_parallel} does not divide the model's "
            f"{config.num_kv_heads} key-value heads, which attention kernels split; choose a "
            "divisor, or attention xla."
        )
    if q_len != kv_len:
        return "xla"
    if config.platform == "cpu":
        return "blocks" if q_len >= block_attention.MIN_SEQ else "xla"
    able = (
        name for name in PREFERENCE.get(config.platform, ()) if not refusal(name, config, q_len)
    )
    return next(able, "xla")


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    scale: float,
    softcap: float | None = None,
) -> jax.Array:
    """Computes grouped-query scaled dot-product attention under a mask, by XLA.

    Args:
      query: `[batch, q_len, heads, head_dim]`.
      key, value: `[batch, kv_len, kv_heads, head_dim]`, `heads % kv_heads == 0`.
      mask: bool `[batch, 1, q_len, kv_len]`.
      scale: factor of the query-key products.
      softcap: `cap * tanh(logit / cap)` before the softmax, or None.

    Returns:
      `[batch, q_len, heads, head_dim]` in the dtype of `query`.
    """
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    return attend_cache(query, key, value, mask=mask, scale=scale, softcap=softcap)


def attend_in_parts(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    scale: float,
    softcap: float | None = None,
) -> jax.Array:
    """Computes `attend` for `PART` queries of a row at a time, as long rows need.

    The scores of one part, `[heads, PART, kv_len]`, are all that is held, also in the backward
    pass, which computes them again.

    Args:
      query, key, value, mask, scale, softcap: as in `attend`.

    Returns:
      `[batch, q_len, heads, head_dim]` in the dtype of `query`.
    """
    batch, q_len = query.shape[:2]
    parts = -(-q_len // PART)
    padding = (0, parts * PART - q_len)
    query = jnp.pad(query, ((0, 0), padding, (0, 0), (0, 0)))
    # A padded query sees every key, so that no row of the softmax is empty.
    mask = jnp.pad(mask, ((0, 0), (0, 0), padding, (0, 0)), constant_values=True)

    @jax.checkpoint
    def one_part(i):
        row, first = i // parts, i % parts * PART
        queries, keys, values, seen = (
            jax.lax.dynamic_slice_in_dim(x, row, 1) for x in (query, key, value, mask)
        )
        queries = jax.lax.dynamic_slice_in_dim(queries, first, PART, axis=1)
        seen = jax.lax.dynamic_slice_in_dim(seen, first, PART, axis=2)
        return attend(queries, keys, values, mask=seen, scale=scale, softcap=softcap)[0]

    out = jax.lax.map(one_part, jnp.arange(batch * parts))
    return out.reshape(batch, parts * PART, *out.shape[2:])[:, :q_len]


def attend_cache(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    scale: float,
    softcap: float | None = None,
) -> jax.Array:
    """Computes `attend` by XLA, with keys and values in the layout of the cache.

    Heads lie outside positions: then each head's product reads one block of memory, which on CPU
    is three times as fast as with heads inside.

    Args:
      query: `[batch, q_len, heads, head_dim]`.
      key, value: `[batch, kv_heads, kv_len, head_dim]`.
      mask, scale, softcap: as in `attend`.

    Returns:
      `[batch, q_len, heads, head_dim]` in the dtype of `value`.
    """
    batch, q_len, heads, head_dim = query.shape
    kv_heads, kv_len = key.shape[1], key.shape[2]
    # The query heads that share a key head are flattened with their positions into one axis, so
    # that the product is a plain batched matmul.
    grouped = query.swapaxes(1, 2).reshape(batch, kv_heads, -1, head_dim)
    logits = jnp.einsum("bksd,bktd->bkst", grouped, key, preferred_element_type=jnp.float32)
    logits = logits.reshape(batch, kv_heads, -1, q_len, kv_len) * scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    logits = jnp.where(mask[:, :, None], logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    out = jnp.einsum("bkst,bktd->bksd", weights.reshape(batch, kv_heads, -1, kv_len), value)
    return out.reshape(batch, heads, q_len, head_dim).swapaxes(1, 2)


def windows(config: DecoderConfig) -> tuple[int, ...]:
    """Returns the window sizes that layers have, 0 (no window) first."""
    count = len(config.windowed_layers)
    if count in (0, config.num_layers):
        return (config.window if count else 0,)
    return (0, config.window)


def attention_inputs(
    config: DecoderConfig, visibility: Visibility
) -> jax.Array | tuple[jax.Array, ...]:
    """Returns the input of the chosen backend: masks (`masks`) or segment ids `[batch, seq]`."""
    q_len, kv_len = (segments.shape[1] for segments in visibility[:2])
    if choose_backend(config, q_len, kv_len) != "xla":
        return visibility.query_segments
    return masks(config, visibility)


def masks(config: DecoderConfig, visibility: Visibility) -> tuple[jax.Array, ...]:
    """Returns a mask, bool `[batch, 1, q_len, kv_len]`, for each of `windows`."""
    return tuple(visibility.mask(window) for window in windows(config))


def select_mask(masks: tuple[jax.Array, ...], windowed: ArrayLike) -> jax.Array:
    """Returns a layer's mask among `masks`; `windowed` is a bool scalar, which may be traced."""
    return masks[0] if len(masks) == 1 else jnp.where(windowed, masks[1], masks[0])


def attend_row(
    config: DecoderConfig,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    masks_or_segments: jax.Array | tuple[jax.Array, ...],
    windowed: ArrayLike,
) -> jax.Array:
    """Computes `attend` by the chosen backend, for queries and keys at the same positions.

    Args:
      config: the decoder's config.
      query, key, value: as in `attend`.
      masks_or_segments: what `attention_inputs` returns.
      windowed: bool scalar, whether the layer has a window.

    Returns:
      `[batch, seq, heads, head_dim]` in the dtype of `query`.
    """
    scale, softcap = config.attention_scale, config.attention_softcap
    seq = query.shape[1]
    backend = choose_backend(config, seq, key.shape[1])
    if backend == "xla":
        mask = select_mask(masks_or_segments, windowed)
        attend_xla = attend_in_parts if seq > LONG_ROW and config.platform != "cpu" else attend
        return attend_xla(query, key, value, mask=mask, scale=scale, softcap=softcap)

    def kernel(window, query, key, value, segments):
        static = {"window": window, "scale": scale, "softcap": softcap}
        if backend == "blocks":
            return block_attention.attend(query, key, value, segments=segments, **static)
        return kernels.attend(
            backend, query, key, value=value, segments=segments, **static, mesh=config.mesh
        )

    # A window as long as the row hides nothing.
    by_window = [functools.partial(kernel, w if w < seq else 0) for w in windows(config)]
    inputs = (query, key, value, masks_or_segments)
    if len(by_window) == 1:
        return by_window[0](*inputs)
    # A kernel is built for one window, so a layer branches between the two.
    return jax.lax.cond(windowed, by_window[1], by_window[0], *inputs)
