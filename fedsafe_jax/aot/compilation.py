"""Compiles programs of shapes for a target, and measures what the compiler made of them."""

import math
import re
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from fedsafe_jax.aot import hlo
from fedsafe_jax.aot.program import Program
from fedsafe_jax.aot.targets import GIB, Target, around
from fedsafe_jax.federated.client import LOCAL_STEPS

KINDS = ("base", "adapters", "optimizer", "batch", "cache", "temporaries", "output")
# What libtpu says of a program that is too large, its arguments and results counted in spite of
# the words; then as older ones say it: "Used 33.1G of 15.75G hbm".
REQUIRED = re.compile(r"(?:required for HLO temporaries \(|Used )([\d.]+)([KMGT])")
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Result(NamedTuple):
    """What became of a program; the fields are those of the JSON of `fedsafe compile`.

    Attributes:
      target: name of the target.
      program: name of the program.
      fits: whether the compiler took the program, and its arrays fit into a device's memory.
      gib: GiB a device by kind of array, see `KINDS`; temporaries hold the program itself, and,
        where the compiler gave up, all beyond the arguments, the output included.
      over_gib: GiB by which a program does not fit, 0 where it does, or where the compiler does
        not say.
      flops: operations of products a call, on all devices, attention kernels included.
      flops_per_useful_token, minimum_flops_per_token: the same by token that is not padding, and
        the least that is possible; 0 for a program without tokens.
      useful_share: of the tokens computed, those that are no padding; 0 likewise.
      attention: backend of its attention, and the kernels that the compiled program holds.
      kernels: names of the kernels in the compiled program.
      collectives_in_steps, collectives_outside: operations between devices in the loop over local
        steps (in a program without one: all of it is outside), and elsewhere: `op`, `bytes` of one
        execution on a device, and `times` that it is executed.
      bytes_in_steps: bytes of all executions in the loop over local steps.
      seconds: seconds of lowering and compiling.
      devices: devices that run the program.
    """

    target: str
    program: str
    fits: bool
    gib: dict[str, float]
    over_gib: float
    flops: float
    flops_per_useful_token: float
    minimum_flops_per_token: float
    useful_share: float
    attention: str
    kernels: list[str]
    collectives_in_steps: list[dict]
    collectives_outside: list[dict]
    bytes_in_steps: int
    seconds: float
    devices: int


def lower(program: Program, target: Target) -> Any:
    """Lowers a program for a target, as `jax.jit(...).trace(...).lower(...)` does."""
    with around(program.mesh):
        traced = program.function.trace(*program.arguments)
        return traced.lower(lowering_platforms=(target.platform,))


def bytes_on_a_device(tree: Any) -> int:
    """Returns the bytes of a pytree's arrays on one device of their shardings."""

    def size(x):
        itemsize = 8 if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x.dtype.itemsize
        return math.prod(x.sharding.shard_shape(x.shape)) * itemsize

    return sum(size(x) for x in jax.tree.leaves(tree))


def required(message: str) -> float | None:
    """Returns the bytes a device that a compiler found a program to need.

    Args:
      message: of the compiler's error.

    Returns:
      0 where the compiler does not say how many; None where the error is not about the memory of
      devices. A kernel that asks for too much of a core's own memory is a fault of the kernel.
    """
    if "RESOURCE_EXHAUSTED" not in message or "hbm" not in message.lower():
        return None
    size = REQUIRED.search(message)
    return float(size[1]) * UNITS[size[2]] if size else 0.0


def compile_program(program: Program, target: Target) -> Result:
    """Compiles a program; one that does not fit is a result too.

    Raises:
      jax.errors.JaxRuntimeError: the compiler failed for another reason than memory.
    """
    started = time.perf_counter()
    held = {kind: bytes_on_a_device(tree) for kind, tree in program.kinds.items()}
    counts: hlo.Counts | None = None
    needed = sum(held.values())
    try:
        compiled = lower(program, target).compile()
    except jax.errors.JaxRuntimeError as error:
        if (whole := required(str(error))) is None:
            raise
        temporary = max(whole - needed, 0)
        needed += temporary
    else:
        memory = compiled.memory_analysis()
        temporary = memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
        held["output"] = max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0)
        needed = memory.argument_size_in_bytes + temporary + held["output"]
        counts = hlo.count(compiled.as_text(), program.trips, LOCAL_STEPS, program.shares)
    hidden = min(program.hidden_optimizer, temporary)
    if hidden:
        held["optimizer"] = held.get("optimizer", 0) + hidden
    held["temporaries"] = temporary - hidden
    devices = program.mesh.size
    kernels, collectives = (counts.kernels, counts.collectives) if counts else ((), ())
    flops = (counts.flops + counts.kernel_flops) * devices if counts else 0
    per_token = 1 / program.tokens if program.tokens else 0.0
    over = max(needed - target.memory, 0) if target.memory else 0

    def listed(in_steps: bool) -> list[dict]:
        return [
            {"op": c.op, "bytes": c.bytes, "times": c.trips}
            for c in collectives
            if c.in_steps == in_steps
        ]

    return Result(
        target=target.name,
        program=program.name,
        fits=counts is not None and not over,
        gib={kind: round(held[kind] / GIB, 6) for kind in KINDS if kind in held},
        over_gib=round(over / GIB, 3),
        flops=float(flops),
        flops_per_useful_token=flops * per_token,
        minimum_flops_per_token=program.minimum * per_token,
        useful_share=round(program.tokens / program.computed, 4) if program.computed else 0.0,
        attention=program.attention,
        kernels=list(kernels),
        collectives_in_steps=listed(True),
        collectives_outside=listed(False),
        bytes_in_steps=sum(c.bytes * c.trips for c in collectives if c.in_steps),
        seconds=round(time.perf_counter() - started, 1),
        devices=devices,
    )


def ratio(result: Result) -> float:
    """Returns operations a useful token over the least that is possible; NaN without tokens."""
    if not result.minimum_flops_per_token or not result.flops:
        return float(np.nan)
    return result.flops_per_useful_token / result.minimum_flops_per_token
