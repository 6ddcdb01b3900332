"""Counts of compiled modules against formulas; excerpts of GPU and TPU modules stand beside."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from fedsafe_jax.aot import hlo


def text_of(f, *shapes):
    """The optimised module of `f` for float32 arguments of these shapes, integers as they are."""
    arguments = [x if isinstance(x, int) else jax.ShapeDtypeStruct(x, jnp.float32) for x in shapes]
    return jax.jit(f).lower(*arguments).compile().as_text()


@pytest.mark.parametrize(
    "shape, size",
    [
        ("bf16[4,256]{1,0:T(8,128)(2,1)S(1)}", 2048),
        ("pred[3]{0:T(512)}", 3),
        ("f8e4m3fn[2,3]{1,0}", 6),
        ("s4[3]{0}", 2),
        ("c64[2]", 16),
        ("s32[]", 4),
        ("(f32[2]{0}, /*index=1*/(bf16[4]{0}, token[]), u32[]{:S(2)})", 20),
    ],
)
def test_bytes_of_shapes(shape, size):
    assert hlo.num_bytes(shape) == size


def test_a_text_without_a_module_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.count("stablehlo.module {}")


def test_a_product():
    counts = hlo.count(text_of(lambda x, w: x @ w, (24, 32), (32, 40)))
    assert counts.flops == 2 * 24 * 32 * 40
    [product] = counts.products
    assert (product.lhs, product.rhs, product.out) == ((24, 32), (32, 40), (24, 40))
    assert counts.collectives == counts.kernels == counts.unknown_loops == ()


def test_a_batched_product_contracts_two_dimensions():
    f = lambda x, y: jnp.einsum("bnij,bkij->bnk", x, y)  # noqa: E731
    counts = hlo.count(text_of(f, (3, 16, 4, 8), (3, 24, 4, 8)))
    assert counts.flops == 2 * 3 * 16 * 24 * 4 * 8


def scan_in_loop(x, w, n):
    """Seven products a trip; `n` trips, which the compiler cannot know."""

    def seven(_, x):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=7)[0]

    with jax.named_scope("target_chunks"):
        return jax.lax.fori_loop(0, n, seven, x)


def test_loops_multiply_and_unknown_trips_are_told_by_scope():
    text, once = text_of(scan_in_loop, (16, 32), (32, 32), 3), 2 * 16 * 32 * 32
    assert hlo.count(text, {"target_chunks": 5}).flops == 5 * 7 * once
    assert hlo.count(text, {"target_chunks": 5}).unknown_loops == ()
    # The name of another scope that begins alike is not this one.
    unknown = hlo.count(text, {"target": 5})
    assert unknown.flops == 7 * once
    assert unknown.unknown_loops == ("jit(scan_in_loop)/target_chunks/while",)


def test_the_trips_of_a_scope_are_not_those_of_loops_further_in():
    def f(x, w, n):
        inner = lambda x: jax.lax.fori_loop(0, n, lambda _, x: jnp.tanh(x @ w), x)  # noqa: E731
        with jax.named_scope("target_chunks"):
            return jax.lax.fori_loop(0, n, lambda _, x: inner(x) @ w, x)

    counts = hlo.count(text_of(f, (16, 32), (32, 32), 3), {"target_chunks": 5})
    assert sorted(x.trips for x in counts.products) == [5, 5]
    assert len(counts.unknown_loops) == 1


# As the compiler for TPU writes a loop: its trips are not noted, and the bound is carried along.
LOOP = """HloModule m

%body (p: (s32[], f32[16,32], f32[32,32], s32[])) -> (s32[], f32[16,32], f32[32,32], s32[]) {{
  %p = (s32[]{{:T(128)}}, f32[16,32]{{1,0:T(8,128)}}, f32[32,32]{{1,0}}, s32[]) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%p), index=0
  %x = f32[16,32]{{1,0:T(8,128)}} get-tuple-element(%p), index=1
  %w = f32[32,32]{{1,0:T(8,128)}} get-tuple-element(%p), index=2
  %n = s32[]{{:T(128)}} get-tuple-element(%p), index=3
  %step = s32[]{{:T(128)}} constant({step})
  %copy = s32[]{{:T(128)}} copy(%i)
  %next = s32[]{{:T(128)}} add(%copy, %step)
  %y = f32[16,32]{{1,0}} convolution(%x, %w), dim_labels=bf_io->bf
  ROOT %t = (s32[], f32[16,32], f32[32,32], s32[]) tuple(%next, %y, %w, {carried})
}}

%condition (q: (s32[], f32[16,32], f32[32,32], s32[])) -> pred[] {{
  %q = (s32[]{{:T(128)}}, f32[16,32]{{1,0}}, f32[32,32]{{1,0}}, s32[]) parameter(0)
  %j = s32[]{{:T(128)}} get-tuple-element(%q), index=0
  %end = s32[]{{:T(128)}} get-tuple-element(%q), index=3
  %constant = s32[]{{:T(128)}} constant({stop})
  ROOT %test = pred[]{{:T(512)}} compare({compared}), direction={direction}
}}

ENTRY %main (x0: f32[16,32], w0: f32[32,32]) -> f32[16,32] {{
  %x0 = f32[16,32]{{1,0}} parameter(0)
  %w0 = f32[32,32]{{1,0}} parameter(1)
  %first = s32[]{{:T(128)}} constant({start})
  %last = s32[]{{:T(128)}} constant({stop})
  %begin = (s32[], f32[16,32], f32[32,32], s32[]) tuple(%first, %x0, %w0, %last)
  %loop = (s32[], f32[16,32], f32[32,32], s32[]) while(%begin), condition=%condition, body=%body
  ROOT %z = f32[16,32]{{1,0}} get-tuple-element(%loop), index=1
}}
"""


@pytest.mark.parametrize("compared", ["%j, %constant", "%constant, %j", "%j, %end", "%end, %j"])
@pytest.mark.parametrize(
    "start, stop, step, direction",
    [(0, 12, 1, "LT"), (3, 12, 4, "LT"), (3, 11, 4, "LE"), (10, -1, -3, "GT"), (9, 0, -3, "GE"),
     (5, 5, 1, "LT")],
)  # fmt: skip
def test_trips_of_a_counter_that_the_compiler_does_not_note(start, stop, step, direction, compared):
    bound = stop + {"LE": 1, "GE": -1}.get(direction, 0)
    if compared.endswith("%j"):
        direction = {"L": "G", "G": "L"}[direction[0]] + direction[1]
    text = LOOP.format(
        start=start, stop=stop, step=step, direction=direction, compared=compared, carried="%n"
    )
    counts = hlo.count(text)
    assert counts.flops == len(range(start, bound, step)) * 2 * 16 * 32 * 32
    assert counts.unknown_loops == ()


def test_a_bound_that_changes_is_no_bound():
    text = LOOP.format(
        start=0, stop=12, step=1, direction="LT", compared="%j, %end", carried="%next"
    )
    assert hlo.count(text).unknown_loops == ("loop",)


def test_a_conditional_counts_as_its_largest_branch():
    def f(x, w, i):
        branches = [lambda x: x, lambda x: x @ w @ w, lambda x: x @ w]
        return jax.lax.switch(i, branches, x)

    assert hlo.count(text_of(f, (16, 32), (32, 32), 1)).flops == 2 * 2 * 16 * 32 * 32


def test_a_conditional_counts_by_the_shares_of_its_branches():
    """In a loop, and under `vmap` with another choice inside, which has no shares."""

    def f(x, w, index):
        def inner(x):
            return jax.lax.cond(x[0, 0] > 0, lambda x: x @ w @ w @ w, lambda x: x, x)

        def step(x, i):
            branches = [lambda x: x @ w, lambda x: x @ w @ w, inner]
            with jax.named_scope("slots"):
                return jax.lax.switch(i, branches, x), None

        return jax.lax.scan(step, x, index)[0]

    shapes = (16, 32), (32, 32)
    arguments = [jax.ShapeDtypeStruct(x, jnp.float32) for x in shapes]
    text = jax.jit(f).lower(*arguments, jax.ShapeDtypeStruct((8,), jnp.int32)).compile().as_text()
    found = hlo.count(text, shares={"slots": (0.5, 0.25, 0.25)})
    assert found.flops == 8 * (0.5 + 0.25 * 2 + 0.25 * 3) * 2 * 16 * 32 * 32


def test_gradient_with_recomputation():
    layers, tokens, width, inner = 3, 16, 32, 64

    def loss(x, up, down):
        def layer(x, weights):
            return x + jnp.tanh(x @ weights[0]) @ weights[1], None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, (up, down))[0] ** 2)

    shapes = (tokens, width), (layers, width, inner), (layers, inner, width)
    text = text_of(jax.grad(loss, argnums=(1, 2)), *shapes)
    # Forward, both gradients of each product, and the first product again; the second one's
    # result is not needed again.
    assert hlo.count(text).flops == layers * (4 + 2 + 1) * 2 * tokens * width * inner


def test_clients_under_vmap_share_one_product_of_the_base():
    clients, tokens, width, rank = 4, 16, 32, 8

    def f(x, w, a, b):
        return jax.vmap(lambda x, a, b: x @ w + x @ a @ b, in_axes=(0, 0, 0))(x, a, b)

    shapes = (
        (clients, tokens, width),
        (width, width),
        (clients, width, rank),
        (clients, rank, width),
    )
    counts = hlo.count(text_of(f, *shapes))
    assert counts.flops == 2 * clients * tokens * width * (width + 2 * rank)
    assert sum(x.rhs == (width, width) for x in counts.products) == 1


@pytest.mark.parametrize("length", [5, 1])
def test_collectives_inside_and_outside_the_steps(length):
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))

    def device(x):
        step = lambda x, _: (jax.lax.psum(jnp.sin(x), "x"), None)  # noqa: E731
        with jax.named_scope("local_steps"):
            x = jax.lax.scan(step, x, None, length=length)[0]
        return jax.lax.all_gather(jnp.cos(x), "x", tiled=True)

    f = jax.shard_map(
        device, mesh=mesh, in_specs=PartitionSpec("x"), out_specs=PartitionSpec(), check_vma=False
    )
    counts = hlo.count(text_of(f, (8, 4)))
    assert sorted(counts.collectives) == [
        hlo.Collective(op="all-gather", bytes=8 * 4 * 4, trips=1, in_steps=False),
        hlo.Collective(op="all-reduce", bytes=4 * 4 * 4, trips=length, in_steps=True),
    ]
    elsewhere = hlo.count(text_of(f, (8, 4)), steps="other_steps")
    assert not any(x.in_steps for x in elsewhere.collectives)


ASYNC = """HloModule m

ENTRY %main (p: f32[8,4]) -> f32[16,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %g = (f32[8,4]{1,0}, f32[16,4]{1,0}) all-gather-start(%p), dimensions={0}
  %r = f32[8,4]{1,0} all-reduce-start(%p), to_apply=%add
  %m = ((f32[8,4]{1,0:T(8,128)}, f32[8]), (f32[2]{0}, /*index=1*/bf16[4]), u32[]) all-to-all-start(%p, %p)
  %s = (f32[8,4]{1,0}, bf16[4]{0}) all-reduce-start(%p, %q), to_apply=%add
  %t = ((f32[8,4]{1,0}), f32[8,4]{1,0}) all-reduce-start(%p), to_apply=%add
  %rd = f32[8,4]{1,0} all-reduce-done(%r)
  ROOT %gd = f32[16,4]{1,0} all-gather-done(%g)
}
"""  # noqa: E501


def test_the_result_of_a_started_collective():
    counts = hlo.count(ASYNC)
    assert [(x.op, x.bytes) for x in counts.collectives] == [
        ("all-gather", 16 * 4 * 4),
        ("all-reduce", 8 * 4 * 4),
        ("all-to-all", 2 * 4 + 4 * 2),
        ("all-reduce", 8 * 4 * 4 + 4 * 2),
        ("all-reduce", 8 * 4 * 4),
    ]


# A collective that runs beside other work, by real lines of a module for TPU: it is in the text of
# its start, of the fusions that it runs beside, and of its end.
BESIDE = """HloModule m

%start (p: f32[4096]) -> (f32[4096], f32[16384], u32[]) {
  %p = f32[4096]{0:T(1024)S(1)} parameter(0)
  %gather = f32[16384]{0:T(1024)} all-gather(%p), channel_id=8, dimensions={0}
  ROOT %custom-call.37 = (f32[4096]{0}, f32[16384]{0}, u32[]{:S(2)}) custom-call(%gather), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.707 (q: f32[4096], x: f32[16,32], w: f32[32,32]) -> (f32[16,32], f32[16384]) {
  %q = f32[4096]{0:T(1024)S(1)} parameter(0)
  %x = f32[16,32]{1,0} parameter(1)
  %w = f32[32,32]{1,0} parameter(2)
  %y = f32[16,32]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
  %gather.1 = f32[16384]{0:T(1024)S(1)} all-gather(%q), channel_id=8, dimensions={0}
  ROOT %tuple = (f32[16,32]{1,0}, f32[16384]{0}) tuple(%y, %gather.1)
}

%end (r: f32[4096]) -> f32[16384] {
  %r = f32[4096]{0:T(1024)S(1)} parameter(0)
  %gather.2 = f32[16384]{0:T(1024)} all-gather(%r), channel_id=8, dimensions={0}
  ROOT %custom-call.39 = f32[16384]{0:T(1024)S(1)} custom-call(%r, %gather.2), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a: f32[4096], b: f32[16,32], c: f32[32,32]) -> f32[16384] {
  %a = f32[4096]{0} parameter(0)
  %b = f32[16,32]{1,0} parameter(1)
  %c = f32[32,32]{1,0} parameter(2)
  %async-collective-start = (f32[4096]{0}, f32[16384]{0}, u32[]{:S(2)}) fusion(%a), kind=kCustom, calls=%start
  %fusion.707 = (f32[16,32]{1,0}, f32[16384]{0}) fusion(%a, %b, %c), kind=kOutput, calls=%async_collective_fusion.707, backend_config={"flag_configs":[],"continuation_config":{"operand_original_start":"1"}}
  ROOT %async-collective-done = f32[16384]{0} fusion(%a), kind=kCustom, calls=%end
}
"""  # noqa: E501


def test_a_collective_beside_other_work_is_one():
    counts = hlo.count(BESIDE)
    assert [(x.op, x.bytes) for x in counts.collectives] == [("all-gather", 16384 * 4)]
    assert counts.flops == 2 * 16 * 32 * 32


LIBRARIES = """HloModule m

ENTRY %main (x: bf16[8,16,64], w: bf16[8,32,64], a: f32[64,16]) -> bf16[8,16,32] {
  %x = bf16[8,16,64]{2,1,0} parameter(0)
  %w = bf16[8,32,64]{2,1,0} parameter(1)
  %a = f32[64,16]{1,0} parameter(2)
  %b = f32[64,48]{1,0} parameter(3)
  %cublas = (bf16[8,16,32]{2,1,0}, s8[4194304]{0}) custom-call(%x, %w), custom_call_target="TARGET", backend_config={"operation_queue_id":"0","gemm_backend_config":{"alpha_real":1,"beta":0,"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["2"],"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]},"epilogue":"DEFAULT"}}
  %onednn = f32[16,48]{1,0} custom-call(%a, %b), custom_call_target="__onednn$matmul", backend_config={"outer_dimension_partitions":[],"onednn_matmul_config":{"transpose_a":true,"transpose_b":false}}
  %fmha = (bf16[8,16,32]{2,1,0}, u8[0]{0}) custom-call(%x, %w), custom_call_target="__cudnn$fmhaSoftmax", metadata={op_name="jit(f)/dot_product_attention_fwd"}, backend_config={"cudnn_fmha_backend_config":{"bmm1_dot_dimension_numbers":{"lhs_contracting_dimensions":["2"]}}}
  ROOT %out = bf16[8,16,32]{2,1,0} get-tuple-element(%cublas), index=0
}
"""  # noqa: E501


@pytest.mark.parametrize("target", ["__cublas$gemm", "__cublas$lt$matmul", "__cublas$lt$matmul$f8"])
def test_products_of_libraries(target):
    counts = hlo.count(LIBRARIES.replace("TARGET", target))
    assert [x.flops for x in counts.products] == [2 * 8 * 16 * 32 * 64, 2 * 16 * 48 * 64]
    assert counts.kernels == ("__cudnn$fmhaSoftmax",)


@pytest.mark.parametrize(
    "window",
    [
        {},
        {"window_strides": (2,), "padding": ((1, 1),)},
        {"lhs_dilation": (3,), "padding": ((4, 2),)},
        {"rhs_dilation": (2,), "padding": ((-1, 3),)},
        {"window_strides": (3,), "lhs_dilation": (2,), "rhs_dilation": (3,), "padding": ((5, 4),)},
        {"feature_group_count": 2},
        {"batch_group_count": 2},
    ],
)
def test_convolutions_count_what_meets(window):
    features = 6 // window.get("feature_group_count", 1)
    fields = {"window_strides": (1,), "padding": ((0, 0),)} | window

    def f(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, **fields)

    shapes = (4, 6, 11), (8, features, 5)
    # Every product of two ones adds one.
    products = np.asarray(f(*map(np.ones, shapes))).sum()
    assert hlo.count(text_of(f, *shapes)).flops == 2 * products


@pytest.mark.parametrize(
    "platform, kernel, after",
    [
        ("gpu", "__gpu$xla.gpu.triton:mha_forward", ("all-gather", 2 * 4)),
        ("tpu", "tpu_custom_call:splash_mha_fwd_no_residuals", ("all-reduce", 4 * 4)),
    ],
)
def test_real_modules(platform, kernel, after):
    """Modules for two H100 and v5e:2x2, cut down to what is counted.

    Three local steps, then chunks of 64 tokens through a head of 1,024 tokens. A step takes 256
    tokens of two clients through a shared `[256, 256]`, an adapter of rank 32 a client,
    attention, and a sum over devices.
    """
    text = (pathlib.Path(__file__).parent / f"{platform}.txt").read_text()
    counts = hlo.count(text, {"target_chunks": 5})
    base, adapter, head = 2 * 256 * 256 * 256, 2 * 2 * 256 * 256 * 32, 2 * 64 * 256 * 1024
    assert sorted(x.flops * x.trips for x in counts.products) == sorted(
        [3 * base, 3 * adapter // 2, 3 * adapter // 2, 5 * head]
    )
    assert counts.flops == 3 * (base + adapter) + 5 * head
    assert counts.collectives == (
        hlo.Collective(op="all-reduce", bytes=128 * 256 * 2, trips=3, in_steps=True),
        hlo.Collective(op=after[0], bytes=after[1], trips=1, in_steps=False),
    )
    assert counts.kernels == (kernel,)
    assert counts.unknown_loops == ()
    assert hlo.count(text).unknown_loops == ("jit(prog)/shard_map/target_chunks/while",)
