"""Attention kernels of GPU and TPU, over packed rows, for many clients at once.

A kernel is called once, with the rows of all clients: `flatten_vmap` folds the clients into rows,
in the forward and in the backward pass, as the kernels' own rules for `vmap` are missing or wrong
(jax's rule for cuDNN raises where a bias has one head, and does not map keys beside queries). On
several devices a kernel runs in a `shard_map` of its own, which splits the heads along the mesh
axis `model`: neither cuDNN, Triton nor Mosaic calls are partitioned by the compiler.

Triton's kernel is compiled by jax itself and holds no scores. cuDNN takes a mask as a bias `[rows,
1, seq, seq]`, which windows and large heads need; its form for packed rows has no bias and skips
other segments. Splash attention is the kernel for TPU, and skips blocks that no query sees.
"""

import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from fedsafe_jax.models.flatten_vmap import flatten_vmap
from fedsafe_jax.models.precision import own_precision
from fedsafe_jax.models.sharding import MODEL
from fedsafe_jax.models.visibility import Visibility

ROW = 128  # Kernels take rows of a multiple of this; shorter ones are padded.
# A block of splash attention is the whole row up to this length: fewer and larger blocks are
# faster, and above it the chip's vector memory does not suffice (compiled for v5e).
LARGEST_SPLASH_BLOCK = 1024
TRITON_HEAD, CUDNN_HEAD = 128, 256  # largest heads
# Segments of a row that cuDNN's packed form keeps apart, as its statistics are `[rows, segments,
# heads, seq]`. A row with more of them is NaN, as cuDNN would merge the last ones.
MOST_SEGMENTS = 64


def attend(
    name: str,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array,
    window: int,
    scale: float,
    softcap: float | None = None,
    mesh: Mesh | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Computes causal grouped-query attention within segments, by a kernel.

    Args:
      name: a key of `KERNELS`.
      query: `[batch, seq, heads, head_dim]`.
      key, value: `[batch, seq, kv_heads, head_dim]`.
      segments: int32 `[batch, seq]`; the tokens of a segment lie side by side.
      window: number of positions that a query sees, its own included; 0 for all before it.
      scale: factor of the query-key products.
      softcap: `cap * tanh(score / cap)` before the softmax, or None; splash alone has it.
      mesh: devices that compute, of which `model` splits the heads; None for one device. Inside a
        `shard_map`, that one's mesh is used.
      interpret: whether the kernel is emulated, to check its numbers on another platform.

    Returns:
      `[batch, seq, heads, head_dim]` in the dtype of `query`.
    """
    seq = query.shape[1]

    def pad(x, value=0):
        widths = [(0, 0), (0, -seq % ROW)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, widths, constant_values=value)

    # The padding is a segment of its own, which no token sees.
    inputs = *(pad(x) for x in (query, key, value)), pad(segments, -1)
    static = Call(name, window, scale, softcap=softcap, interpret=interpret)
    return _attention(static, mesh, *inputs)[:, :seq]


class Call(NamedTuple):
    """Static arguments of a kernel, as in `attend`; hashable."""

    name: str
    window: int
    scale: float
    softcap: float | None
    interpret: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(static, mesh, query, key, value, segments):
    return _programs(static, mesh)[0](query, key, value, segments)


def _attention_forward(static, mesh, *inputs):
    return _programs(static, mesh)[0](*inputs), inputs


def _attention_backward(static, mesh, inputs, grad):
    return *_programs(static, mesh)[1](*inputs, grad), None


_attention.defvjp(_attention_forward, _attention_backward)


@functools.lru_cache
def _programs(static: Call, mesh: Mesh | None) -> tuple[Callable, Callable]:
    """Returns forward and backward pass of a kernel, with the rules for clients and heads.

    Returns:
      `(query, key, value, segments) -> out`, and `(query, key, value, segments, cotangent of out)
      -> (gradients of query, key and value)`. The backward pass calls the forward kernel again,
      for the statistics of its softmax.
    """
    kernel = functools.partial(KERNELS[static.name], static)

    def forward(query, key, value, segments):
        # As in the backward pass, so that the compiler sees two calls that are the same.
        with own_precision(query.dtype):
            return jax.vjp(lambda *x: kernel(*x, segments), query, key, value)[0]

    def backward(query, key, value, segments, grad):
        # It is traced when the gradient is taken, outside of what the model says of precision.
        with own_precision(query.dtype):
            return jax.vjp(lambda *x: kernel(*x, segments), query, key, value)[1](grad)

    heads, whole = PartitionSpec(None, None, MODEL), PartitionSpec()
    inputs = (heads, heads, heads, whole)
    return (
        flatten_vmap(_over_heads(forward, mesh, inputs, heads)),
        flatten_vmap(_over_heads(backward, mesh, (*inputs, heads), (heads, heads, heads))),
    )


def _over_heads(function: Callable, mesh: Mesh | None, in_specs: tuple, out_specs) -> Callable:
    """Returns a function whose heads are split along `model`, on the devices where it is called.

    Args:
      function: the function of arrays `[rows, seq, heads, head_dim]`.
      mesh: devices that compute, where there is no `shard_map` around the call.
      in_specs, out_specs: specs of arguments and results.
    """

    def call(*arguments):
        around = jax.sharding.get_abstract_mesh()
        if around.manual_axes:
            left, inner = around.auto_axes, None  # of the mesh of the shard_map around this call
        elif mesh is not None and mesh.size > 1:
            left, inner = mesh.axis_names, mesh
        else:
            left, inner = (), None
        if not left:
            return function(*arguments)
        return jax.shard_map(
            function,
            mesh=inner,
            axis_names=set(left),
            in_specs=in_specs,
            out_specs=out_specs,
            check_vma=False,
        )(*arguments)

    return call


def _triton(static: Call, query, key, value, segments):
    """Computes attention by jax's Pallas kernel for Triton, which holds no scores."""
    with warnings.catch_warnings():
        # jax 0.11.2 recommends tokamax instead, which has no segments.
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu import attention as kernels
    groups = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
    return kernels.mha(
        query, key, value, segment_ids=segments, sm_scale=static.scale, causal=True,
        block_sizes=kernels.BlockSizes(**TRITON_BLOCKS), interpret=static.interpret,
    )  # fmt: skip


TRITON_BLOCKS = {
    "block_q": 128,
    "block_k": 128,
    "block_q_dkv": 64,
    "block_kv_dkv": 64,
    "block_q_dq": 64,
    "block_kv_dq": 64,
}


def _cudnn(static: Call, query, key, value, segments):
    """Computes attention by cuDNN, with the mask as a bias of one head."""
    # A bias instead of a mask, because cuDNN fails on a mask alone (jax#28974).
    lowest = jnp.finfo(query.dtype).min / 2
    bias = jnp.where(Visibility.in_rows(segments).mask(static.window), 0.0, lowest).astype(
        query.dtype
    )
    return jax.nn.dot_product_attention(
        query, key, value, bias=jax.lax.stop_gradient(bias), scale=static.scale,
        implementation="xla" if static.interpret else "cudnn",
    )  # fmt: skip


def _packed(static: Call, query, key, value, segments):
    """Computes attention by cuDNN's form for packed rows, on Hopper and newer."""
    from jax._src.cudnn import fused_attention_stablehlo as kernels

    lengths, offsets, fits = segment_bounds(segments, MOST_SEGMENTS)
    # Repeated, as jax 0.10.2 multiplies the offsets of keys by the number of query heads.
    groups = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
    if static.interpret:
        out = _by_bounds(static, query, key, value=value, lengths=lengths, offsets=offsets)
    else:
        out = kernels.dot_product_attention(
            query, key, value, q_seqlen=lengths, kv_seqlen=lengths, q_offsets=offsets,
            kv_offsets=offsets, scale=static.scale, mask_type=kernels.MaskType.PADDING_CAUSAL,
            sliding_window_length=static.window or None,
        )  # fmt: skip
    return jnp.where(fits[:, None, None, None], out, jnp.nan)


def segment_bounds(segments: jax.Array, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns lengths and beginnings of a row's segments, as cuDNN's packed form takes them.

    Args:
      segments: int32 `[rows, seq]`; the tokens of a segment lie side by side.
      most: most segments of a row.

    Returns:
      `(lengths int32 [rows, most], offsets int32 [rows, most + 1], fits bool [rows])`, -1 past a
      row's last segment; a row with more segments than `most` does not fit.
    """
    seq = segments.shape[1]
    is_start = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    starts = jnp.sort(jnp.where(is_start, jnp.arange(seq), seq), axis=1)
    fits = is_start.sum(1) <= most
    starts = jnp.pad(starts, ((0, 0), (0, max(0, most + 1 - seq))), constant_values=seq)
    starts = starts[:, : most + 1]
    lengths = starts[:, 1:] - starts[:, :-1]
    is_there = starts < seq
    lengths = jnp.where(is_there[:, :most], lengths, -1)
    return lengths.astype(jnp.int32), jnp.where(is_there, starts, -1).astype(jnp.int32), fits


def _by_bounds(static: Call, query, key, value, lengths, offsets):
    """Emulates cuDNN's packed form from the very bounds that it gets."""
    slots = jnp.arange(query.shape[1])
    first, length = offsets[:, :-1, None], lengths[:, :, None]
    is_inside = (first >= 0) & (first <= slots) & (slots < first + length)
    segments = jnp.argmax(is_inside, axis=1)
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=Visibility.in_rows(segments).mask(static.window),
        scale=static.scale,
        implementation="xla",
    )


def _splash(static: Call, query, key, value, segments):
    """Computes attention by splash attention, which skips blocks that no query sees."""
    # Pallas for TPU is imported only where it is used.
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    seq, heads = query.shape[1], query.shape[2]
    if static.window:
        mask = kernels.LocalMask((seq, seq), window_size=(static.window - 1, 0), offset=0)
    else:
        mask = kernels.CausalMask((seq, seq))
    block = next(b for b in range(min(seq, LARGEST_SPLASH_BLOCK), 0, -ROW) if seq % b == 0)
    kernel = kernels.make_splash_mha_single_device(
        kernels.MultiHeadMask([mask] * heads),
        block_sizes=kernels.BlockSizes(
            block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block,
            use_fused_bwd_kernel=True,
        ),
        attn_logits_soft_cap=static.softcap,
        interpret=static.interpret,
    )  # fmt: skip
    by_head = [x.swapaxes(1, 2) for x in (query * static.scale, key, value)]
    out = jax.vmap(kernel)(*by_head, kernels.SegmentIds(segments, segments))
    return out.swapaxes(1, 2).astype(query.dtype)


# By the name in `DecoderConfig.attention`.
KERNELS = {"triton": _triton, "cudnn": _cudnn, "packed": _packed, "splash": _splash}
