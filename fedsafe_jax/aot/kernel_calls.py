"""Attention kernels that a compiled module calls: their names, and what they compute.

A kernel's body is not in the module's text, so its operations are those of its algorithm for the
shape of its queries.
"""

import math
import re
from typing import NamedTuple

from fedsafe_jax.aot.hlo_text import Computation, Instruction, dims

# Of these calls the body cannot be read: Triton and Mosaic kernels, cuDNN's attention.
TARGETS = re.compile(r"triton|mosaic|tpu_custom_call|fmha")
# Products of queries and keys' size by what a name holds; the first that fits counts. A forward
# pass has two; a backward pass computes the scores again and has five (FlashAttention-2, arXiv
# 2307.08691); Triton's kernel has seven, as it computes scores and their gradient twice.
PRODUCTS = (
    (re.compile(r"preprocess"), 0),
    (re.compile(r"mha_backward"), 7),
    (re.compile(r"splash\w*dkv|fmha\w*Backward"), 5),
    (re.compile(r"mha_forward|splash\w*fwd|fmha"), 2),
)
# The axis of tokens in queries of four dimensions, by what a name holds; else the axis of GPUs.
TPU_AXIS, GPU_AXIS = 2, 1


class Kernel(NamedTuple):
    """One call of a kernel.

    Attributes:
      name: "target" or "target:name".
      flops: operations of one execution on one device, of all pairs of tokens in a row that a
        causal mask leaves, though a kernel may skip more or less; 0 of kernels that are no
        attention.
      trips: how often it is executed.
    """

    name: str
    flops: int
    trips: int


def read(line: Instruction, around: Computation) -> Kernel | None:
    """Returns the kernel that a custom call is, None of any other call.

    Args:
      line: an instruction `custom-call`.
      around: the computation that it stands in.
    """
    target = re.search(r'custom_call_target="([^"]*)"', line.tail)[1]
    if not TARGETS.search(target):
        return None
    # The name is in Triton's configuration or in the metadata.
    given = re.search(r'[,{] name = "([\w.$-]+)"', line.tail)
    given = given or re.search(r"([\w.$-]+)\)*/pallas_call\b", line.op_name())
    name = f"{target}:{given[1]}" if given else target
    return Kernel(name, _flops(name, line, around), trips=1)


def _flops(name: str, line: Instruction, around: Computation) -> int:
    products = next((count for pattern, count in PRODUCTS if pattern.search(name)), 0)
    operands = (dims(around.instructions[x].shape) for x in line.operands())
    query = next((x for x in operands if len(x) == 4), None)  # before keys and masks
    if query is None:
        return 0
    seq = query[TPU_AXIS if "splash" in name else GPU_AXIS]
    # Two operations a number of a query and key, of which half are seen.
    return products * math.prod(query) * seq
