"""Every program of a run, lowered for GPUs and TPUs: its kernels, base products, and precision."""

import functools
import math
import re

import jax
import numpy as np
import pytest
from lowered import (
    MODEL,
    config,
    dots,
    kernel_dots,
    kernels,
    pretend,
    programs,
    run_on,
    shape,
    text_of,
)

from fedsafe_jax.aot.filter_programs import filters
from fedsafe_jax.aot.program import PROJECTION_NAMES
from fedsafe_jax.aot.programs import constitutional, federated, generation
from fedsafe_jax.cli.compile import PROGRAMS
from fedsafe_jax.data import packing
from fedsafe_jax.evals.tasks import divergence
from fedsafe_jax.federated.aggregation import AGGREGATORS
from fedsafe_jax.guarding import blocks
from fedsafe_jax.inference import decoding
from fedsafe_jax.inference.decoding_state import Steering
from fedsafe_jax.inference.sampling import Sampling
from fedsafe_jax.models import row_queue
from fedsafe_jax.models.decoder_config import ModelError
from fedsafe_jax.models.known import KNOWN

TRITON, CUDNN, SPLASH = "__gpu$xla.gpu.triton", "__cudnn$fmha", "tpu_custom_call"
TARGET = {"triton": TRITON, "cudnn": CUDNN, "packed": CUDNN, "splash": SPLASH}
COMMUNICATION = re.compile(
    r"(?:stablehlo|sdy)\.(?:all_reduce|all_gather|reduce_scatter|all_to_all|collective_\w+)"
)
LADDERS = row_queue.LADDERS
BATCH = packing.Batch._fields
# Platforms, devices and model_parallel. The slow ones differ from the others in one of the three.
LAYOUTS = [
    ("cuda", 4, 2),
    ("tpu", 1, 1),
    *(
        pytest.param(*layout, marks=pytest.mark.slow)
        for layout in [("cuda", 1, 1), ("cuda", 4, 1), ("tpu", 4, 1), ("tpu", 4, 2)]
    ),
]


def on_both_platforms(names):
    """Pairs of a name and a platform; every name stands once among those that are not slow."""
    platforms = ("cuda", "tpu")
    return [
        pytest.param(name, platform, marks=[pytest.mark.slow] * ((i + j) % 2))
        for i, name in enumerate(names)
        for j, platform in enumerate(platforms)
    ]


@pytest.fixture
def accelerators(monkeypatch):
    """Lets simulated devices pass for GPUs and TPU chips; `use` sets the model's shape."""
    pretend(monkeypatch, shape())

    def use(**changes):
        monkeypatch.setitem(KNOWN, MODEL, shape(**changes))

    return use


def base_products(text: str):
    """The products with a projection or the logits' matrix of `lowered.shape`, and all others."""
    model = shape()
    sizes = {model.projection_shape(name) for name in PROJECTION_NAMES}
    sizes.add((model.hidden_size, model.vocab_size))
    sizes |= {size[::-1] for size in sizes}
    with_base, others = [], []
    for dot in dots(text):
        # With a leading axis, a base weight would be read once a client.
        is_base = any(operand[-2:] in sizes for operand in (dot.lhs, dot.rhs))
        (with_base if is_base else others).append(dot)
    return sizes, with_base, others


@pytest.mark.parametrize("platform, count, model_parallel", LAYOUTS)
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("all-linear",)])
def test_training_with_dropout_lowers_alike(accelerators, platform, count, model_parallel, targets):
    """The base's products are those without dropout, and nothing more is communicated."""

    def lowered(rate):
        fields = {"lora_dropout": rate, "model_parallel": model_parallel}
        run = run_on(platform, count, config(**fields, lora_targets=targets))
        (train,) = (p for p in federated(run) if p.name == "train")
        text = text_of(train, platform)
        return text, base_products(text)[1], COMMUNICATION.findall(text), kernels(text)

    plain, dropped = lowered(0.0), lowered(0.05)
    # The sketch of an update draws too.
    assert plain[0].count("threefry") < dropped[0].count("threefry")
    assert plain[1:] == dropped[1:]


@pytest.mark.parametrize("platform, count, model_parallel", LAYOUTS)
def test_every_program_lowers_with_its_kernels(
    accelerators, monkeypatch, platform, count, model_parallel
):
    if count == 1:
        monkeypatch.setattr(row_queue, "LADDERS", LADDERS)
    run = run_on(platform, count, config(model_parallel=model_parallel))
    seen = []
    for program in programs(run):
        text = text_of(program, platform)
        seen.append(program.name)
        sizes, with_base, others = base_products(text)
        told = [x for x in text.splitlines() if COMMUNICATION.search(x)]
        if count == 1 or program.name != "train":
            assert not [x for x in told if "gather" in x], program.name
        if program.name == "train" and count > 1:
            # Adapters alone travel between the devices that share the rows of all clients: to
            # all of them, rounded as rows round them, and their gradients back to each client's.
            gathers = [x for x in told if "all_gather" in x]
            # [clients, layers, in, rank] and [clients, layers, rank, out]
            factor = re.compile(rf"-> tensor<(\d+x){{2,3}}{run.lora.rank}x")
            assert gathers and all(factor.search(x) for x in gathers)
            assert any("reduce_scatter" in x for x in told)
        elif model_parallel == 1 and program.name == "train":
            assert not told
        if program.name not in ("train", "prefill", "decode", "cai"):
            continue
        # A weight of the base is one factor of one large product, whatever the clients.
        weights = {x for dot in with_base for x in (dot.lhs, dot.rhs) if x in sizes}
        assert len(weights) == 6, program.name  # of seven projections some have the same shape
        assert all(not dot.batched for dot in with_base), program.name
        # No product makes a gradient of the base.
        assert not [dot for dot in with_base + others if dot.out[-2:] in sizes], program.name
        if program.name == "decode":
            assert program.attention == "xla"
            continue
        assert program.attention == {"cuda": "triton", "tpu": "splash"}[platform]
        found = kernels(text)[TARGET[program.attention]]
        heads = run.shape.num_heads // model_parallel
        # The rows of all clients are in one call, and this device's heads alone.
        calls = [x for x in found if len(x) == 4 and x[-1] == run.shape.head_dim and heads in x]
        assert calls, program.name
        if program.name == "train":
            slots = program.arguments[3].slots
            assert len(slots) == (3 if count == 1 else 1)
            rows = {n // (count // model_parallel) for n in slots}
            assert {x[0] for x in calls} == rows
            down = [dot for dot in with_base if (448, 320) in (dot.lhs, dot.rhs)]
            numbers = {max(map(math.prod, dot[:2])) / 256 for dot in down}
            # Forward, and the gradient of its input.
            assert numbers == {n * width for n in rows for width in (448, 320)}
    assert tuple(seen) == PROGRAMS


@pytest.mark.parametrize("platform, count, model_parallel", LAYOUTS)
def test_holding_the_replay_lowers(accelerators, platform, count, model_parallel):
    """As much of the base is multiplied as without, and once more for the reference's pass."""
    products = {}
    for losses in (("sft",), ("sft", "kl")):
        fields = {"cai__losses": losses, "cai__weights": (1.0,) * len(losses)}
        run = run_on(platform, count, config(model_parallel=model_parallel, **fields))
        (program,) = constitutional(run)
        text = text_of(program, platform)
        sizes, with_base, others = base_products(text)
        assert with_base and all(not dot.batched for dot in with_base)
        assert not [dot for dot in with_base + others if dot.out[-2:] in sizes]
        assert TARGET[program.attention] in kernels(text)
        assert "all_gather" not in " ".join(COMMUNICATION.findall(text))
        products[losses] = len(with_base)
    assert products["sft", "kl"] > 2 * products["sft",]


@pytest.mark.parametrize(
    "platform, model_parallel, name", [("cuda", 2, "constrained_sft"), ("tpu", 1, "kl_start")]
)
def test_holding_clients_to_a_reference_lowers(accelerators, platform, model_parallel, name):
    """Rows are in the same slots, and the reference's pass over them moves nothing more."""

    def lowered(name):
        fields = {"algorithms": (name,), "federated__client_ranks": (4, 16)}
        run = run_on(platform, 4, config(model_parallel=model_parallel, **fields))
        train = next(federated(run))
        text = text_of(train, platform)
        sizes, with_base, others = base_products(text)
        assert with_base and all(not dot.batched for dot in with_base)
        assert not [dot for dot in with_base + others if dot.out[-2:] in sizes]
        assert TARGET[train.attention] in kernels(text)
        return len(with_base), train.arguments[3].slots, sorted(COMMUNICATION.findall(text))

    plain, held = lowered("fedavg"), lowered(name)
    assert held[0] > plain[0] and held[1:] == plain[1:] and held[1]


@pytest.mark.parametrize("platform, count, model_parallel", LAYOUTS)
def test_a_guard_lowers(accelerators, platform, count, model_parallel):
    run = run_on(platform, count, config(filter__kind="guard", model_parallel=model_parallel))
    for program in filters(run):
        text = text_of(program, platform)
        _, with_base, _ = base_products(text)
        assert with_base and all(not dot.batched for dot in with_base)
        heads = run.shape.num_heads // model_parallel
        found = kernels(text)[TARGET[program.attention]]
        assert [x for x in found if len(x) == 4 and x[-1] == 64 and heads in x]


@pytest.mark.parametrize("platform, count, model_parallel", LAYOUTS)
def test_the_prefill_of_several_adapters_lowers(accelerators, platform, count, model_parallel):
    run = run_on(platform, count, config(model_parallel=model_parallel))
    prefill = next(program for program in generation(run) if program.name == "prefill")
    base, factors, packed = prefill.arguments
    stacked = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype, sharding=x.sharding), factors
    )
    function = decoding.prefill_program(run.model, True, prefill.mesh)
    each = prefill._replace(function=function, arguments=(base, stacked, packed))
    _, with_base, _ = base_products(text_of(each, platform))
    assert with_base and all(not dot.batched for dot in with_base)
    called = [
        [x for x in kernels(text_of(program, platform))[TARGET[prefill.attention]] if len(x) == 4]
        for program in (prefill, each)
    ]
    # The rows of all adapters in one call.
    assert {x[0] for x in called[1]} == {3 * x[0] for x in called[0]}


@pytest.mark.parametrize("platform, count, model_parallel", LAYOUTS)
def test_the_blocks_of_a_search_lower(accelerators, platform, count, model_parallel):
    """A steered block is the plain decoding's products; rows are copied where they lie."""
    run = run_on(platform, count, config(model_parallel=model_parallel))
    decode = next(program for program in generation(run) if program.name == "decode")
    base, factors, state, lengths, step, keys, stops = decode.arguments
    split = state.token.sharding

    def of(dtype, *shape, like):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=like)

    vocab = run.shape.vocab_size
    steering = Steering(
        of(np.float32, *state.token.shape, vocab, like=split),
        of(np.float32, *state.token.shape, like=split),
        end=of(np.int32, like=step.sharding),
    )
    arguments = (base, factors, state._replace(steering=steering), lengths, step, keys, stops)
    function = decoding.decode_program(
        run.model, Sampling(1.0), False, mesh=decode.mesh, steered=True
    )
    block = text_of(decode._replace(function=function, arguments=arguments), platform)
    plain = text_of(decode, platform)
    assert base_products(block)[1] == base_products(plain)[1]
    assert COMMUNICATION.findall(block) == COMMUNICATION.findall(plain)
    copy = decode._replace(
        function=blocks.take_program(run.model, decode.mesh), arguments=(state.cache, lengths)
    )
    assert not COMMUNICATION.search(text_of(copy, platform))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_the_divergence_of_several_adapters_lowers(accelerators, platform):
    """On one device; the base is read once for all of them, and attention has its kernel."""
    run = run_on(platform, 1, config())
    prefill = next(program for program in generation(run) if program.name == "prefill")
    base, factors, packed = prefill.arguments
    like = packed.tokens.sharding

    def of(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=like)

    stacked = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype, sharding=x.sharding), factors
    )
    rows = (divergence.ROWS_EACH, 256)
    batch = packing.Batch(*(of(np.float32 if n == "mask" else np.int32, *rows) for n in BATCH))
    places = of(np.int32, 2, divergence.CHUNK_EACH)
    function = jax.jit(functools.partial(divergence._from_first, run.model))
    each = prefill._replace(function=function, arguments=(base, stacked, batch, places))
    text = text_of(each, platform)
    _, with_base, _ = base_products(text)
    assert with_base and all(not dot.batched for dot in with_base)
    assert TARGET[prefill.attention] in kernels(text)


WINDOWS = {"windowed_layers": (0, 1), "window": 96}
SHAPES = {
    "heads of 128": ({"head_dim": 128}, "triton", "splash"),
    "heads of 96": ({"head_dim": 96}, "triton", "splash"),
    "no groups": ({"num_kv_heads": 14}, "triton", "splash"),
    "one key head": ({"num_kv_heads": 1}, "triton", "splash"),
    "windows": (WINDOWS, "cudnn", "splash"),
    "windows in some layers": (WINDOWS | {"windowed_layers": (1,)}, "cudnn", "splash"),
    "a window as long as the row": (WINDOWS | {"window": 1024}, "triton", "splash"),
    "a cap": ({"attention_softcap": 50.0}, "xla", "splash"),
    "Gemma": ({"head_dim": 256}, "cudnn", "splash"),
    "Gemma 2": (
        WINDOWS | {"windowed_layers": (0,), "head_dim": 256, "attention_softcap": 50.0},
        "xla",
        "splash",
    ),
}


@pytest.mark.parametrize("name, platform", on_both_platforms(SHAPES))
def test_shapes_of_attention_have_a_kernel(accelerators, name, platform):
    changes, *expected = SHAPES[name]
    accelerators(**changes)
    expected = expected[platform == "tpu"]
    # Heads are split where they can be.
    parallel = 2 - changes.get("num_kv_heads", 2) % 2
    run = run_on(platform, 4, config(model_parallel=parallel))
    train, prefill = next(federated(run)), next(generation(run))
    for program in (train, prefill):
        assert program.attention == expected
        found = " ".join(kernels(text_of(program, platform)))
        assert (TARGET[expected] in found) if expected != "xla" else ("fmha" not in found)


@pytest.mark.parametrize(
    "platform, attention",
    [("cuda", "triton"), ("cuda", "cudnn"), ("tpu", "splash"), ("tpu", "blocks")]
    + [
        pytest.param(*both, marks=pytest.mark.slow)
        for both in (("cuda", "packed"), ("cuda", "xla"), ("cuda", "blocks"), ("tpu", "xla"))
    ],
)
def test_attention_can_be_chosen(accelerators, platform, attention):
    run = run_on(platform, 4, config(attention=attention, model_parallel=2))
    for program in (next(federated(run)), next(generation(run)), next(constitutional(run))):
        assert program.attention == attention
        found = " ".join(kernels(text_of(program, platform)))
        assert (TARGET[attention] in found) if attention in TARGET else not found


@pytest.mark.parametrize(
    "platform, changes, attention, message",
    [
        ("cuda", {}, "splash", "attention 'splash': it is a kernel for TPU, and the devices are g"),
        ("tpu", {}, "triton", "attention 'triton': it is a kernel for GPU, and the devices are t"),
        ("cuda", WINDOWS, "triton", "attention 'triton': it has no sliding window, which the mode"),
        ("cuda", {"head_dim": 256}, "triton", "attention 'triton': heads have 256 numbers, and i"),
        ("cuda", {"attention_softcap": 5.0}, "cudnn", "attention 'cudnn': it has no cap of atten"),
        ("cuda", {"num_kv_heads": 1}, "auto", "model_parallel=2 does not divide the model's 1 ke"),
        ("tpu", {"num_kv_heads": 1}, "auto", "model_parallel=2 does not divide the model's 1 ke"),
        ("tpu", {"num_kv_heads": 1}, "splash", "attention 'splash': it splits heads over devices"),
    ],
)
def test_what_cannot_be_computed_is_one_line(accelerators, platform, changes, attention, message):
    accelerators(**changes)
    with pytest.raises(ModelError, match=re.escape(message)) as caught:
        run = run_on(platform, 4, config(attention=attention, model_parallel=2))
        next(federated(run))
    assert "\n" not in str(caught.value)


def test_a_float32_model_has_no_kernel_on_gpu(accelerators):
    with pytest.raises(ModelError, match="it computes in bfloat16, and the model in float32"):
        next(federated(run_on("cuda", 1, config(attention="triton", dtype="float32"))))
    assert next(federated(run_on("cuda", 1, config(dtype="float32")))).attention == "xla"


@pytest.mark.parametrize(
    "name, platform", on_both_platforms(["no groups", "windows", "a cap", "Gemma 2"])
)
def test_long_rows_hold_no_scores_of_all_heads(accelerators, name, platform):
    changes, *_ = SHAPES[name]
    accelerators(max_length=8192, **changes)
    train = next(federated(run_on(platform, 1, config(seq_len=4096))))
    rows = max(train.arguments[3].slots)
    square = re.findall(r"tensor<((?:\d+x)*)4096x4096x", text_of(train, platform))
    # A mask has no axis of heads.
    assert all(math.prod(int(n) for n in sizes.split("x")[:-1]) <= rows for sizes in square)


# The programs of float32 products: what is computed there must not be rounded on the way.
FLOAT32 = {
    "classifier": (filters, {"dtype": "bfloat16"}),
    "mean": (federated, {}),
    "product": (federated, {"federated__average": "product"}),
    "ranks": (federated, {"federated__client_ranks": (4, 16)}),
    "noise": (federated, {"federated__clip_norm": 1.0, "federated__noise_multiplier": 1.0}),
    "scaffold": (federated, {"algorithms": ("scaffold",)}),
    "int8": (federated, {"quantization": "int8"}),
    "nf4": (federated, {"quantization": "nf4"}),
    "top k": (federated, {"federated__compression": "topk"}),
    "blocks": (federated, {"attention": "blocks"}),
    "generation": (generation, {}),
    "cai": (constitutional, {}),
    "kto": (constitutional, {"cai__losses": ("kto",), "cai__weights": (1.0,)}),
    "kl": (constitutional, {"cai__losses": ("sft", "kl"), "cai__weights": (1.0, 1.0)}),
    "derta": (constitutional, {"cai__losses": ("derta",), "cai__weights": (1.0,)}),
    "guard": (filters, {"filter__kind": "guard"}),
    **{name: (federated, {"federated__aggregator": name}) for name in AGGREGATORS},
}


@pytest.mark.parametrize("name, platform", on_both_platforms(FLOAT32))
def test_products_of_float32_are_not_rounded(accelerators, name, platform):
    make, changes = FLOAT32[name]
    run = run_on(platform, 1, config(**{"dtype": "float32"} | changes))
    count = 0
    for program in make(run):
        if name in AGGREGATORS and program.name == "train":
            continue  # as with any other
        text = text_of(program, platform)
        found = dots(text)
        if SPLASH in kernels(text):
            found += kernel_dots(program)
        count += len(found)
        for dot in found:
            assert dot.precision == ("HIGHEST", "HIGHEST"), (program.name, dot)
        assert "stablehlo.convolution" not in text
    assert count


def test_the_singular_values_of_a_mean_product_are_float32(accelerators):
    server = config(federated__average="product", dtype="bfloat16")
    texts = {
        platform: text_of(list(federated(run_on(platform, 1, server)))[-1], platform)
        for platform in ("cuda", "tpu")
    }
    assert {"cusolver_geqrf_ffi", "cusolver_gesvdj_ffi"} <= kernels(texts["cuda"]).keys()
    assert "Qr" in kernels(texts["tpu"])
    for text in texts.values():
        assert all(dot.precision == ("HIGHEST", "HIGHEST") for dot in dots(text))
        assert "bf16" not in text


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_the_base_of_a_bfloat16_model_is_multiplied_in_bfloat16(accelerators, platform):
    run = run_on(platform, 1, config())
    for program in programs(run):
        if program.name in ("train", "prefill", "decode", "cai"):
            _, with_base, _ = base_products(text_of(program, platform))
            assert all("HIGHEST" not in dot.precision for dot in with_base)
            is_narrow = [dot for dot in with_base if dot.types == ("bf16", "bf16")]
            # The gradient of the logits alone is float32, and is rounded by the compiler.
            wide = {size for dot in with_base if dot not in is_narrow for size in dot[:2]}
            assert is_narrow and all(768 in size for size in wide)
