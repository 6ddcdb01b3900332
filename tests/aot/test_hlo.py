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


def excerpt(name: str) -> str:
    return (pathlib.Path(__file__).parent / f"{name}.txt").read_text()


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


def test_trips_of_a_counter_that_the_compiler_does_not_note():
    text = text_of(scan_in_loop, (16, 32), (32, 32), 3)
    assert '"known_trip_count":{"n":"7"}' in text
    without = text.replace('"known_trip_count":{"n":"7"}', '"other":{}')
    assert hlo.count(without, {"target_chunks": 5}).flops == 5 * 7 * 2 * 16 * 32 * 32


@pytest.mark.parametrize("stages, trips", [((0, 12, 1), 12), ((3, 12, 4), 3), ((10, -1, -3), 4)])
def test_counters_of_other_steps(stages, trips):
    start, stop, step = stages

    def f(x, w):
        going = (lambda c: c[0] < stop) if step > 0 else (lambda c: c[0] > stop)
        return jax.lax.while_loop(going, lambda c: (c[0] + step, jnp.tanh(c[1] @ w)), (start, x))

    text = text_of(f, (16, 32), (32, 32)).replace('"known_trip_count"', '"other"')
    assert hlo.count(text).flops == trips * 2 * 16 * 32 * 32


def test_a_conditional_counts_as_its_largest_branch():
    def f(x, w, i):
        branches = [lambda x: x, lambda x: x @ w @ w, lambda x: x @ w]
        return jax.lax.switch(i, branches, x)

    assert hlo.count(text_of(f, (16, 32), (32, 32), 1)).flops == 2 * 2 * 16 * 32 * 32


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
    ]
