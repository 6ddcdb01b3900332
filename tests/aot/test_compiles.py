"""Training and prefill, compiled for TPUs and H100s that are not here; `.ci/compiles` runs it.

Lowering does not find what compiling finds: what the partitioner gathers, whether a kernel is
compiled, how often a weight of the base is read.
"""

import importlib.util
import math

import pytest

CUDA = any(map(importlib.util.find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin")))
TPU = importlib.util.find_spec("libtpu") is not None
if not (CUDA or TPU):
    pytest.skip("needs fedsafe_jax[aot]; .ci/compiles installs it", allow_module_level=True)

import jax  # noqa: E402
from lowered import MODEL, config, shape  # noqa: E402

from fedsafe_jax.aot import compilation, hlo, lengths, targets  # noqa: E402
from fedsafe_jax.aot.program import PROJECTION_NAMES, Run  # noqa: E402
from fedsafe_jax.aot.programs import federated, generation  # noqa: E402
from fedsafe_jax.federated.client import LOCAL_STEPS  # noqa: E402
from fedsafe_jax.models import row_queue  # noqa: E402
from fedsafe_jax.models.known import KNOWN  # noqa: E402

LAYERS, HIDDEN, VOCAB, RANK, SEQ, STEPS = 2, 768, 4096, 16, 512, 2
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 1280,
    "num_heads": 8,
    "num_kv_heads": 4,
    "head_dim": 128,
    "max_length": 2048,
}
# Clients of a device, which train at once; the tokens of three are no width, nor half of one.
CLIENTS = 3


@pytest.fixture(scope="module", autouse=True)
def surroundings():
    """The model's shape by its name; nothing here is read from, or written to, a cache."""
    patch = pytest.MonkeyPatch()
    patch.setitem(KNOWN, MODEL, shape(**SHAPE))
    patch.setattr(row_queue, "LADDERS", ((1,),))  # one number of slots
    patch.setenv("TPU_SKIP_MDS_QUERY", "1")
    patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    cached = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", cached)
    patch.undo()


@pytest.fixture(
    scope="module", params=[("v5e:2x2", 1), ("h100", 1), ("h100:2", 2)], ids=lambda x: x[0]
)
def compiled(request, surroundings):
    """`(run, {name: (program, counts)})` of a target: training, and prefill."""
    name, model_parallel = request.param
    target = targets.parse(name)
    if not (TPU if target.platform == "tpu" else CUDA):
        pytest.skip(f"no compiler for {name}")
    on_devices = targets.devices(target)
    clients = CLIENTS * len(on_devices) // model_parallel
    c = config(
        model_parallel=model_parallel, clients_per_round=clients, seq_len=SEQ, local_steps=STEPS,
        lora_rank=RANK,
    )  # fmt: skip
    run = Run(c, on_devices, lengths.default())
    found = {}
    for program in (next(federated(run)), next(generation(run))):
        text = compilation.lower(program, target).compile().as_text()
        found[program.name] = program, hlo.count(text, program.trips, LOCAL_STEPS)
    return run, found


def tokens_at_once(run, program) -> int:
    """Tokens that go through a layer together on one copy of the base, padding included."""
    if program.name == "prefill":
        return program.arguments[2].tokens.size // run.mesh.shape["clients"]
    return program.arguments[3].slots[-1] // run.mesh.shape["clients"] * SEQ


def weights(run) -> dict[str, int]:
    """Numbers of a layer's projections by name, on all devices of a copy."""
    return {name: math.prod(run.shape.projection_shape(name)) for name in PROJECTION_NAMES}


def test_every_loop_is_counted(compiled):
    _, found = compiled
    assert all(counts.unknown_loops == () for _, counts in found.values())


def test_attention_is_a_kernel(compiled):
    run, found = compiled
    kind, name = {"tpu": ("tpu_custom_call", "splash_mha"), "gpu": ("triton", "mha")}[
        run.shape.platform
    ]
    for program, counts in found.values():
        assert any(kind in kernel and f":{name}_f" in kernel for kernel in counts.kernels)
        backward = [kernel for kernel in counts.kernels if "dkv" in kernel or "backward" in kernel]
        assert bool(backward) == (program.name == "train")


def test_a_weight_of_the_base_is_read_once_for_all_clients(compiled):
    run, found = compiled
    least = min(weights(run).values()) // run.mesh.shape["model"]
    for program, counts in found.values():
        tokens = tokens_at_once(run, program)
        large = [
            x for x in counts.products if "_proj/" in x.op_name and x.flops >= 2 * tokens * least
        ]
        assert len(large) >= 4
        for product in large:
            # Were the weight repeated for each client, no operand had its size.
            weight = product.flops // (2 * tokens)
            assert weight in map(math.prod, (product.lhs, product.rhs)), product


def test_no_product_is_a_gradient_of_the_base(compiled):
    run, found = compiled
    counts = found["train"][1]
    tokens = tokens_at_once(run, found["train"][0]) // CLIENTS  # of one client
    factor = RANK * max(max(run.shape.projection_shape(name)) for name in PROJECTION_NAMES)
    for product in counts.products:
        contracted = product.flops // (2 * math.prod(product.out))
        if "_proj/" in product.op_name and contracted % (tokens // 4) == 0:
            is_input = math.prod(product.out) % tokens == 0
            assert is_input or math.prod(product.out) <= CLIENTS * 2 * factor, product


def test_operations_are_those_of_the_formula(compiled):
    run, found = compiled
    sizes, copies = weights(run), run.mesh.shape["clients"]
    layer = sum(sizes.values())
    adapters = RANK * sum(sum(run.shape.projection_shape(name)) for name in run.lora.targets)
    program, counts = found["prefill"]
    tokens = tokens_at_once(run, program)
    prompts = program.arguments[2].last.size
    once = 2 * LAYERS * tokens * (layer + adapters) * copies + 2 * prompts * HIDDEN * VOCAB
    assert counts.flops * run.mesh.size == pytest.approx(once, rel=0.03)
    program, counts = found["train"]
    tokens = tokens_at_once(run, program)
    # Forward, again for the backward pass (without what only the last projection needs), and the
    # gradients of the inputs; an adapter has gradients of its factors as well.
    once = 2 * LAYERS * tokens * (3 * layer - sizes["down_proj"] + 4 * adapters)
    chunk = min(1024, tokens)
    logits = 2 * program.trips["target_chunks"] * 2 * chunk * HIDDEN * VOCAB
    assert counts.flops * run.mesh.size == pytest.approx(copies * STEPS * (once + logits), rel=0.03)


def test_devices_tell_each_other_what_they_must(compiled):
    run, found = compiled
    parallel = run.mesh.shape["model"]
    program, counts = found["train"]
    in_steps = {x.op for x in counts.collectives if x.in_steps}
    copies = run.mesh.shape["clients"]
    if copies == 1:
        assert in_steps == ({"all-reduce"} if parallel > 1 else set())
    else:
        # Adapters to all devices, which share the rows, and their gradients back.
        assert in_steps and in_steps <= {"all-gather", "reduce-scatter", "all-reduce"}
    # Updates and figures of clients alone are gathered after the steps.
    gathered = sum(
        x.bytes * x.trips for x in counts.collectives if "gather" in x.op and not x.in_steps
    )
    clients = program.arguments[2].weights.size
    numbers = sum(x.size for x in jax.tree.leaves(run.factors))
    assert gathered <= 4 * clients * (4096 + 16 + (numbers if parallel > 1 else 0))
    program, counts = found["prefill"]
    if parallel == 1:
        assert counts.collectives == ()
        return
    # Megatron's sums: one behind the embeddings, two in each layer.
    assert {x.op for x in counts.collectives} == {"all-reduce"}
    activations = tokens_at_once(run, program) * HIDDEN * 2
    assert sum(x.bytes * x.trips for x in counts.collectives) == (1 + 2 * LAYERS) * activations
