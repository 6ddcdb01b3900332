"""The figures of `fedsafe compile`: memory by kind, what does not fit, and least operations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedsafe_jax.aot import compilation, hlo, targets
from fedsafe_jax.aot.program import Program, attended, least, on
from fedsafe_jax.data.packing import Batch
from fedsafe_jax.federated.mesh import make_mesh
from fedsafe_jax.models import lora
from fedsafe_jax.models.decoder import Decoder, param_shapes
from fedsafe_jax.models.decoder_config import DecoderConfig

GIB = 2**30
# What libtpu 0.0.42 said of 12 GiB of arguments and 6 of temporaries on a v5e; then an older one.
MESSAGES = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(18.00G) exceeds available HBM (15.75G).",
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 18.00G of 15.75G hbm. "
    "Exceeded hbm capacity by 2.25G.",
)
KERNEL_FAULT = (
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem while allocating on stack for "
    "%splash_mha_fwd. Scoped allocation with size 18.00M and limit 16.00M exceeded scoped vmem "
    "limit by 2.00M."
)


def small(function, *shapes):
    """A program of `function` whose arguments are float32 `shapes`, the first one the base."""
    mesh = make_mesh(jax.devices()[:1])
    arguments = on(tuple(jax.ShapeDtypeStruct(x, jnp.float32) for x in shapes), mesh)
    kinds = {"base": arguments[0], "batch": arguments[1:]}
    return Program("train", jax.jit(function, donate_argnums=1), arguments, kinds=kinds, mesh=mesh)


def test_a_donated_argument_is_no_output():
    program = small(lambda base, cache: (base @ base, cache + 1), (64, 64), (1024, 1024))
    result = compilation.compile_program(program, targets.parse("cpu"))
    assert result.gib["base"] * GIB == pytest.approx(4 * 64 * 64, abs=1e3)
    assert result.gib["batch"] * GIB == pytest.approx(4 * 1024 * 1024, abs=1e3)
    assert result.gib["output"] * GIB == pytest.approx(4 * 64 * 64, abs=2e3)
    assert result.fits and result.flops == 2 * 64**3


@pytest.mark.parametrize("message", MESSAGES)
def test_what_does_not_fit_says_by_how_much(message, monkeypatch):
    def refuse(*_):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(compilation, "lower", refuse)
    program = small(lambda x, y: x, (GIB // 4,), (2 * GIB // 4,))._replace(hidden_optimizer=GIB)
    result = compilation.compile_program(program, targets.parse("v5e"))
    assert (result.fits, result.over_gib) == (False, 2.25)
    assert result.gib == {"base": 1, "batch": 2, "optimizer": 1, "temporaries": 14}


def test_a_message_without_a_number_does_not_fit_either(monkeypatch):
    def refuse(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory on HBM.")

    monkeypatch.setattr(compilation, "lower", refuse)
    result = compilation.compile_program(small(lambda x, y: x, (8,), (8,)), targets.parse("v5e"))
    assert (result.fits, result.over_gib) == (False, 0)


def test_a_kernel_that_asks_for_too_much_is_a_fault():
    assert compilation.required(KERNEL_FAULT) is None
    assert compilation.required("INTERNAL: Mosaic failed to compile") is None


def test_a_copy_is_compiled_as_a_slice_of_its_own():
    part = lambda name, count: targets.part(targets.parse(name), count)  # noqa: E731
    assert part("v5e:4x4", 4).topology == "2x2" and part("v5p:2x2x2", 4).topology == "2x2x1"
    assert part("v5e:4x4", 4).memory == targets.parse("v5e").memory
    assert part("v6e:2x4", 2) is None  # there is no slice of two
    assert part("v5e:2x2", 4) is part("h100:4", 2) is part("cpu:4", 2) is None


TRITON = """HloModule kernels

ENTRY %main (q: bf16[12,512,32,128], lse: f32[12,32,512]) -> bf16[12,512,32,128] {
  %q = bf16[12,512,32,128]{3,2,1,0} parameter(0)
  %lse = f32[12,32,512]{2,1,0} parameter(1)
  %forward = (bf16[12,512,32,128]{3,2,1,0}, f32[12,32,512]{2,1,0}) custom-call(%q, %q, %q), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(f)/jvp(jit(mha))/mha_forward/pallas_call"}
  %before = f32[12,32,512]{2,1,0} custom-call(%q, %q), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(f)/mha_preprocess_backward/pallas_call"}
  %backward = (bf16[12,512,32,128]{3,2,1,0}, bf16[12,512,32,128]{3,2,1,0}) custom-call(%q, %q, %q, %lse), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(f)/transpose(jvp(mha_backward))/mha_backward/pallas_call"}
  ROOT %out = bf16[12,512,32,128]{3,2,1,0} get-tuple-element(%backward), index=0
}
"""  # noqa: E501
CUDNN = """HloModule kernels

ENTRY %main (q: bf16[12,512,32,128], k: bf16[12,512,8,128], bias: bf16[12,1,512,512]) -> bf16[12,32,512,128] {
  %q = bf16[12,512,32,128]{3,2,1,0} parameter(0)
  %k = bf16[12,512,8,128]{3,2,1,0} parameter(1)
  %bias = bf16[12,1,512,512]{3,2,1,0} parameter(2)
  %forward = (bf16[12,32,512,128]{3,1,2,0}, f32[12,32,512]{2,1,0}, u8[0]{0}) custom-call(%q, %k, %k, %bias), custom_call_target="__cudnn$fmhaScaleBiasSoftmax"
  %backward = (bf16[12,32,512,128]{3,1,2,0}, bf16[12,8,512,128]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %k, %bias), custom_call_target="__cudnn$fmhaScaleBiasSoftmaxBackward"
  ROOT %out = bf16[12,32,512,128]{3,1,2,0} get-tuple-element(%backward), index=0
}
"""  # noqa: E501
SPLASH = """HloModule kernels

ENTRY %main (next: s8[1,1,1], q: bf16[12,16,512,128], k: bf16[12,4,512,128], ids: s32[12,512,128]) -> bf16[12,4,512,128] {
  %next = s8[1,1,1]{2,1,0} parameter(0)
  %q = bf16[12,16,512,128]{3,2,1,0} parameter(1)
  %k = bf16[12,4,512,128]{3,2,1,0} parameter(2)
  %ids = s32[12,512,128]{2,1,0} parameter(3)
  %forward = (f32[12,512,128]{2,1,0}, bf16[12,16,512,128]{3,2,1,0}) custom-call(%next, %q, %k, %k, %ids), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/splash_mha_fwd_segmented_residuals/pallas_call"}
  %backward = (bf16[12,1,16,512,128]{4,3,2,1,0}, bf16[12,4,512,128]{3,2,1,0}) custom-call(%next, %q, %k, %k, %ids), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/splash_mha_dkv_segmented_no_residuals/pallas_call"}
  ROOT %out = bf16[12,4,512,128]{3,2,1,0} get-tuple-element(%backward), index=1
}
"""  # noqa: E501


@pytest.mark.parametrize(
    "text, heads, products", [(TRITON, 32, 2 + 7), (CUDNN, 32, 2 + 5), (SPLASH, 16, 2 + 5)]
)
def test_operations_of_kernels(text, heads, products):
    counts = hlo.count(text)
    # Two operations for each number of a pair of tokens, of which a causal mask leaves half.
    assert counts.kernel_flops == products * 2 * 12 * heads * (512 * 512 // 2) * 128
    assert counts.flops == 0


def test_tokens_that_one_attends_to():
    ids = np.array([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 2, 0]])
    positions = np.array([[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 0]])
    seen = [
        sum(row[j] == row[i] for j in range(i + 1))
        for row in ids
        for i in range(len(row))
        if row[i]
    ]
    assert attended(positions, ids) == pytest.approx(np.mean(seen))


@pytest.mark.parametrize("remat", [False, True])
def test_least_operations_are_those_of_a_compiled_step(remat):
    rows, seq = 2, 64
    config = DecoderConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=384,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        remat=remat,
        attention="xla",
    )
    factors = jax.eval_shape(
        lambda: lora.init(jax.random.key(0), config, lora.LoraConfig(1, 1.0, ("q_proj",)))
    )
    model, base = Decoder(config, 1.0), param_shapes(config)
    fields = [jax.ShapeDtypeStruct((rows, seq), jnp.int32)] * 5

    def loss(factors, base, batch):
        inputs = batch.tokens, batch.positions, batch.segment_ids
        hidden, _ = model.apply({"params": base, "lora": factors}, *inputs)
        return jnp.sum(hidden**3)

    step = jax.jit(jax.grad(loss)).lower(factors, base, Batch(*fields)).compile()
    counted = hlo.count(step.as_text()).flops
    # XLA's attention computes the whole square; rank 1 adds next to nothing.
    expected = least(config, rows * seq, seen=seq, logits=0, trains=True, remat=remat)
    assert 1 <= counted / expected < 1.02
    more = dataclasses.replace(config, num_layers=6)
    assert least(more, rows * seq, seen=seq, logits=0) == pytest.approx(
        2 * least(config, rows * seq, seen=seq, logits=0)
    )
