"""Programs of a run lowered for GPUs and TPUs on a machine that has neither, and their products.

Simulated CPU devices stand in: the first four pass for GPUs and the next four for TPU chips, for
whoever asks the package for the platform of a mesh. A program that is compiled for one of them is
therefore never found in a cache that holds the other's.
"""

import functools
import re
import sys
import types
from collections.abc import Iterator
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from fedsafe_jax.aot import compilation, lengths, targets
from fedsafe_jax.aot.filter_programs import filters
from fedsafe_jax.aot.program import Program, Run
from fedsafe_jax.aot.programs import constitutional, federated, generation
from fedsafe_jax.config import default_config
from fedsafe_jax.models import known, row_queue, sharding
from fedsafe_jax.models.decoder_config import DecoderConfig

MODEL = "tests/small"  # the name in a config, as of a public model whose shape is known
PLATFORMS = {"cuda": "gpu", "tpu": "tpu"}
DOT = re.compile(
    r"stablehlo\.dot_general %\S+, %\S+, (?:batching_dims = \[([\d, ]*)\] x \[[\d, ]*\], )?"
    r"contracting_dims = \[[\d, ]*\] x \[[\d, ]*\](?:, precision = \[(\w+), (\w+)\])?[^:]*"
    r" : \(tensor<([^>]*)>, tensor<([^>]*)>\) -> tensor<([^>]*)>"
)
CALL = re.compile(r"stablehlo\.custom_call @([\w$.]+)\(")
TENSOR = re.compile(r"tensor<((?:\d+x)*)(\w+)>")


class Dot(NamedTuple):
    """A product of a lowered program: shapes, types of the operands, precision, batch axes."""

    lhs: tuple[int, ...]
    rhs: tuple[int, ...]
    out: tuple[int, ...]
    types: tuple[str, str]
    precision: tuple[str, str]
    batched: int


def shape(**changes) -> DecoderConfig:
    """Two layers whose head size and widths choose the real kernels; no two widths are alike."""
    fields = {
        "vocab_size": 768,
        "hidden_size": 320,
        "intermediate_size": 448,
        "num_layers": 2,
        "num_heads": 14,
        "num_kv_heads": 2,
        "head_dim": 64,
        "max_length": 1024,
        "tie_embeddings": False,
    }
    return DecoderConfig(**(fields | changes))


def config(**changes) -> ConfigDict:
    """A config of four clients with two local steps of bfloat16, and fields by their path."""
    c = default_config()
    c.model, c.dtype, c.seq_len, c.remat = MODEL, "bfloat16", 256, True
    c.clients_per_round, c.local_steps, c.batch_size = 4, 2, 2
    c.eval.batch_size, c.eval.max_new_tokens, c.filter.batch_size = 8, 32, 8
    for key, value in changes.items():
        *sections, field = key.split("__")
        section = functools.reduce(getattr, sections, c)
        section[field] = value if field in section else section.pop(field)  # which raises
    return c


def pretend(monkeypatch, model: DecoderConfig) -> None:
    """Lets the simulated devices pass for GPUs and TPUs, and names `model` in `known.KNOWN`."""
    real = sharding.platform_of

    def platform_of(mesh):
        if mesh is None:
            return real(mesh)
        return "gpu" if mesh.devices.flat[0].id < 4 else "tpu"

    for name, module in list(sys.modules.items()):
        if name.startswith("fedsafe_jax") and getattr(module, "platform_of", None) is real:
            monkeypatch.setattr(module, "platform_of", platform_of)
    from jax._src.pallas.triton import pallas_call_registration as triton

    if hasattr(triton, "gpu_info_lib"):  # from jax 0.11 on it asks the device, which is a CPU here
        h100 = types.SimpleNamespace(compute_capability=90)
        info = types.SimpleNamespace(get_gpu_info=lambda: h100)
        monkeypatch.setattr(triton, "gpu_info_lib", info)
    monkeypatch.setitem(known.KNOWN, MODEL, model)
    # One number of slots, as each is lowered by itself.
    monkeypatch.setattr(row_queue, "LADDERS", ((1,),))
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    for name in (
        "check_compute_capability",
        "is_cuda_compute_capability_equal",
        "check_cudnn_version",
    ):
        monkeypatch.setattr(cudnn, name, getattr(cudnn, name))  # put back after the test
    targets._without_a_gpu()


def run_on(platform: str, count: int, c: ConfigDict) -> Run:
    """The programs' common part, on `count` devices that pass for `platform`."""
    first = 0 if platform == "cuda" else 4
    return Run(c, jax.devices()[first : first + count], lengths.default())


def programs(run: Run) -> Iterator[Program]:
    """Every program of a run."""
    for make in (federated, filters, generation, constitutional):
        yield from make(run)


def text_of(program: Program, platform: str) -> str:
    """The StableHLO of a program."""
    target = targets.Target("", platform, "", topology="", memory=0)
    return compilation.lower(program, target).as_text()


def dots(text: str) -> list[Dot]:
    """All products of a StableHLO module.

    Raises:
      ValueError: a product is written in a way that is not known here.
    """
    found = []
    for line in text.splitlines():
        # The configuration of a custom call may hold anything.
        if "stablehlo.dot" not in line or "stablehlo.custom_call" in line:
            continue
        match = DOT.search(line)
        if not match:
            raise ValueError(f"no product that can be read: {line.strip()[:300]}")
        batch, *precision = match.groups()[:3]
        operands = [operand.split("x") for operand in match.groups()[3:]]
        sizes = [tuple(map(int, operand[:-1])) for operand in operands]
        dtypes = operands[0][-1], operands[1][-1]
        precision = tuple(p or "DEFAULT" for p in precision)
        batched = len(batch.split(",")) if batch else 0
        lhs, rhs, out = sizes
        found.append(
            Dot(lhs=lhs, rhs=rhs, out=out, types=dtypes, precision=precision, batched=batched)
        )
    return found


def kernels(text: str) -> dict[str, list[tuple[int, ...]]]:
    """The custom calls of a StableHLO module: the shapes of their operands and results, by name."""
    found: dict[str, list[tuple[int, ...]]] = {}
    for line in text.splitlines():
        if match := CALL.search(line):
            # Behind the configuration, which may be long, stand the types.
            tensors = TENSOR.findall(line.rpartition(" : (")[2])
            shapes = [tuple(int(n) for n in sizes.split("x")[:-1]) for sizes, _ in tensors]
            found.setdefault(match[1], []).extend(shapes)
    return found


def kernel_dots(program: Program) -> list[Dot]:
    """All products inside the Pallas kernels of a program, as they were traced."""
    with targets.around(program.mesh):
        traced = program.function.trace(*program.arguments)
    found: list[Dot] = []

    def walk(jaxpr, inside: bool) -> None:
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general" and inside:
                operands = [x.aval for x in (*equation.invars[:2], equation.outvars[0])]
                precision = equation.params["precision"] or ("DEFAULT", "DEFAULT")
                found.append(
                    Dot(
                        lhs=operands[0].shape,
                        rhs=operands[1].shape,
                        out=operands[2].shape,
                        types=tuple(str(x.dtype) for x in operands[:2]),
                        precision=tuple(str(p).rpartition(".")[2] for p in precision),
                        batched=len(equation.params["dimension_numbers"][1][0]),
                    )
                )
            is_kernel = inside or equation.primitive.name == "pallas_call"
            for value in jax.tree.leaves(
                list(equation.params.values()),
                is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"),
            ):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    walk(inner, is_kernel)

    walk(traced.jaxpr.jaxpr, False)
    return found
