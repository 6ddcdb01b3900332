"""What a compiled XLA module does: products, collectives, attention kernels, with their counts.

Compilers count a loop's body once, and some count nothing, so here each operation is multiplied by
the trips of the loops around it. The formats are those of `compiled.as_text()` for CPU, TPU and
GPU: a product is a `dot` (also inside a fusion), a `convolution` on TPU, or a library's call.
"""

import functools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from fedsafe_jax.aot import kernel_calls
from fedsafe_jax.aot.hlo_text import (
    Computation,
    Instruction,
    counted_trips,
    dims,
    has_scope,
    ints,
    num_bytes,
    parse,
    parts,
)

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# What these call is a scalar function of elements.
ELEMENTWISE = ("reduce", "reduce-window", "select-and-scatter", "scatter", "sort", "map")
BRANCHES = {"true_computation", "false_computation", "branch_computations"}
LOOP_BODY = "/while/body"


class Collective(NamedTuple):
    """One collective operation of a module.

    Attributes:
      op: a member of `COLLECTIVES`.
      bytes: size of one execution's result on one device.
      trips: how often it is executed, the product of the trips of the loops around it.
      in_steps: whether it lies inside the loop over local steps.
    """

    op: str
    bytes: int
    trips: int
    in_steps: bool


class Product(NamedTuple):
    """One matrix product of a module.

    Attributes:
      lhs, rhs, out: shapes of the operands and of the result, as the compiler arranged them.
      flops: floating-point operations of one execution.
      trips: how often it is executed; a mean where it lies in a branch with a share.
      op_name: where it comes from in the program, "" where the compiler has lost that.
    """

    lhs: tuple[int, ...]
    rhs: tuple[int, ...]
    out: tuple[int, ...]
    flops: int
    trips: float
    op_name: str


class Counts(NamedTuple):
    """What a module does on one device.

    Attributes:
      flops: floating-point operations of all products, those inside `kernels` left out.
      kernel_flops: operations of all attention kernels, see `kernel_calls`.
      collectives: all collectives, in the order of execution; of a conditional all branches'.
      kernels: attention kernels as "target" or "target:name", once per call in the text.
      products: what `flops` is made of; of a conditional the branch with most flops, or all
        branches by their shares.
      unknown_loops: op_names of loops with products or collectives whose trips are not known, and
        that were counted once.
    """

    flops: int
    kernel_flops: int
    collectives: tuple[Collective, ...]
    kernels: tuple[str, ...]
    products: tuple[Product, ...]
    unknown_loops: tuple[str, ...]


def count(
    text: str,
    trips: Mapping[str, int] | None = None,
    steps: str = "local_steps",
    shares: Mapping[str, Sequence[float]] | None = None,
) -> Counts:
    """Returns what a compiled module executes on one device.

    The trips of a loop are those that the compiler notes; else those of its counter, if it starts,
    steps and ends by constants; else those in `trips`; else 1.

    Args:
      text: `compiled.as_text()`, with metadata.
      trips: trips of loops whose length is data, by the `jax.named_scope` right around the loop.
      steps: the `jax.named_scope` around the loop over local steps. Where the compiler has
        unrolled this loop (one step), a collective that comes from its body counts as inside.
      shares: of a conditional, the share of its executions in which each branch is taken, from the
        one with least flops to that with most, by the `jax.named_scope` right around it.

    Raises:
      ValueError: the text is no HLO module.
    """
    counter = _Counter(text, trips or {}, steps, shares or {})
    done = counter.executed(counter.module.entry)
    loops = tuple(dict.fromkeys(done.unknown_loops))
    return Counts(
        flops=round(done.flops()),
        kernel_flops=round(sum(x.flops * x.trips for x in done.kernels)),
        collectives=done.collectives,
        kernels=tuple(counter.kernels),
        products=done.products,
        unknown_loops=loops,
    )


class _Executed(NamedTuple):
    """What one execution does; fields as in `Counts`."""

    products: tuple[Product, ...] = ()
    kernels: tuple[kernel_calls.Kernel, ...] = ()
    collectives: tuple[Collective, ...] = ()
    unknown_loops: tuple[str, ...] = ()

    def flops(self) -> float:
        return sum(x.flops * x.trips for x in self.products)

    def repeated(self, trips: int, in_steps: bool) -> "_Executed":
        products, kernels = (
            tuple(x._replace(trips=x.trips * trips) for x in field)
            for field in (self.products, self.kernels)
        )
        collectives = [
            x._replace(trips=x.trips * trips, in_steps=x.in_steps or in_steps)
            for x in self.collectives
        ]
        return _Executed(products, kernels, tuple(collectives), self.unknown_loops)


def _one_after_another(all_done: Iterable[_Executed]) -> _Executed:
    return _Executed(*(sum(field, ()) for field in zip(*all_done, strict=True)))


class _Counter:
    """Walks through a module; each computation is read once, however often it is called."""

    def __init__(
        self,
        text: str,
        trips: Mapping[str, int],
        steps: str,
        shares: Mapping[str, Sequence[float]],
    ):
        self.module = parse(text)
        self.trips, self.steps, self.shares = trips, steps, shares
        self.kernels: list[str] = []
        self.executed = functools.cache(self._computation)
        self.has_steps_loop = any(
            line.op == "while" and has_scope(steps, self._scope(line))
            for computation in self.module.computations.values()
            for line in computation.instructions.values()
        )

    def _computation(self, name: str) -> _Executed:
        """Returns what one execution of the computation `name` does."""
        around = self.module.computations[name]
        return _one_after_another(self._line(x, around) for x in around.instructions.values())

    def _line(self, line: Instruction, around: Computation) -> _Executed:
        """Returns what an instruction does, with all that it calls."""
        op = line.op.removesuffix("-start")
        if line.op.endswith(("-done", "-update")) or op in ELEMENTWISE:
            return _Executed()
        if op in COLLECTIVES:
            return _Executed(collectives=(self._collective(line, op),))
        if op == "while":
            return self._loop(line, around)
        if product := _product(line, around):
            return _Executed(products=(product,))
        if op == "custom-call" and (kernel := kernel_calls.read(line, around)):
            self.kernels.append(kernel.name)
            return _Executed(kernels=(kernel,))
        called = line.called()
        done = [self.executed(name) for names in called.values() for name in names]
        if BRANCHES & called.keys():
            # By size, as a compiler may turn two branches around.
            done = sorted(done, key=_Executed.flops)
            executed, shares = done[-1], self._shares(line)
            if len(shares) == len(done):
                executed = _one_after_another(
                    x.repeated(share, False) for x, share in zip(done, shares, strict=True)
                )
            # A collective must not hide in a branch with fewer products.
            return executed._replace(collectives=_one_after_another(done).collectives)
        together = _one_after_another(done)
        is_new = not together.collectives or not self._continues(line)
        return together if is_new else together._replace(collectives=())

    def _shares(self, line: Instruction) -> Sequence[float]:
        """Returns the shares of a conditional's branches, () where they are not known."""
        around = line.op_name().removesuffix("/cond").rpartition("/")[2]
        return next((x for name, x in self.shares.items() if has_scope(name, around)), ())

    def _continues(self, line: Instruction) -> bool:
        """Returns whether an instruction goes on with a collective that was counted at its start.

        On TPU a collective that runs beside other work is in the text of its start, of each fusion
        that it runs beside, and of its end.
        """
        if line.op != "fusion" or '"continuation_config"' in line.tail:
            return line.op == "fusion"
        [name] = line.called()["calls"]
        fused = self.module.computations[name].instructions.values()
        return any('custom_call_target="AsyncCollectiveDone"' in x.tail for x in fused)

    def _collective(self, line: Instruction, op: str) -> Collective:
        # A start has the shape `(operands, result, ...)`, operands a tuple or a single shape; an
        # all-reduce's has that of the result alone up to jax 0.10.
        pair = "((" if line.op == "all-reduce-start" else "("
        is_pair = line.op != op and line.shape.startswith(pair)
        before, is_inside, _ = line.op_name().rpartition(LOOP_BODY)
        in_steps = not self.has_steps_loop and bool(is_inside) and has_scope(self.steps, before)
        size = num_bytes(parts(line.shape)[1] if is_pair else line.shape)
        return Collective(op, size, trips=1, in_steps=in_steps)

    def _scope(self, loop: Instruction) -> str:
        """Returns the part of a loop's op_name that is not that of the loops around it.

        Such as "vmap(local_steps)" of "jit(f)/while/body/vmap(local_steps)/while". A loop that has
        lost its name has that of the outermost operations in its body.
        """
        name = loop.op_name().removesuffix("/while")
        if name == loop.op_name():
            body = self.module.computations[loop.called()["body"][0]].instructions.values()
            inside = [x.op_name().split(LOOP_BODY)[:-1] for x in body]
            name = LOOP_BODY.join(min(filter(None, inside), key=len, default=[]))
        return name.rpartition(LOOP_BODY)[2]

    def _loop(self, line: Instruction, around: Computation) -> _Executed:
        """Returns what all trips of a loop do; its condition is counted once a trip."""
        called, scope = line.called(), self._scope(line)
        once = _one_after_another(
            self.executed(name) for key in ("condition", "body") for name in called[key]
        )
        unknown = ()
        if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line.tail):
            trips = int(noted[1])
        elif (trips := counted_trips(self.module, line, around)) is None:
            trips = next((n for name, n in self.trips.items() if has_scope(name, scope)), None)
            if trips is None and (once.products or once.collectives):
                unknown = (line.op_name() or line.name,)
        every = once.repeated(1 if trips is None else trips, has_scope(self.steps, scope))
        return every._replace(unknown_loops=unknown + every.unknown_loops)


def _product(line: Instruction, around: Computation) -> Product | None:
    """Returns the product that an instruction is, None if it is none."""
    contracted = ()
    if line.op in ("dot", "ragged-dot", "scaled-dot"):
        contracted = ints(re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line.tail)[1])
    elif line.op == "custom-call":
        # cuBLAS; then oneDNN, which contracts the last dimension.
        if numbers := re.search(r'"dot_dimension_numbers":(\{[^}]*\})', line.tail):
            numbers = json.loads(numbers[1])
            contracted = tuple(int(x) for x in numbers.get("lhs_contracting_dimensions", ()))
        elif 'custom_call_target="__onednn$matmul' in line.tail:
            contracted = (-2 if '"transpose_a":true' in line.tail else -1,)
        else:
            return None
    elif line.op != "convolution":
        return None
    lhs, rhs = (dims(around.instructions[x].shape) for x in line.operands()[:2])
    out = dims(line.shape)
    if line.op == "convolution":
        flops = _convolution_flops(line.tail, lhs, rhs, out)
    else:
        flops = 2 * math.prod(out) * math.prod(lhs[i] for i in contracted)
    return Product(lhs=lhs, rhs=rhs, out=out, flops=flops, trips=1, op_name=line.op_name())


def _convolution_flops(attributes: str, lhs: tuple, rhs: tuple, out: tuple) -> int:
    """Returns the flops of a convolution, products with padding and dilation's holes left out.

    The compiler for TPU writes a batched product as a convolution along the batch, dilated such
    that one element in `batch` meets another: those alone are counted, as by XLA's own analysis
    (`HloCostAnalysis::HandleConvolution`). Groups need no care: the kernel's input features are
    those of one group, and the output has the batch of one group.
    """
    lhs_labels, rhs_labels, out_labels = re.search(
        r"dim_labels=(\w+)_(\w+)->(\w+)", attributes
    ).groups()
    window = re.search(r"window=\{([^}]*)\}", attributes)
    given = dict(x.split("=") for x in window[1].split()) if window else {}
    rank = len(out_labels) - 2

    def window_of(key: str, default: str) -> list[int]:
        values = given[key].split("x") if key in given else [default] * rank
        return [int(x.split("_")[0]) for x in values]

    pairs = out[out_labels.index("b")] * out[out_labels.index("f")] * rhs[rhs_labels.index("i")]
    for i in range(rank):
        pairs *= _meetings(
            inputs=lhs[lhs_labels.index(str(i))],
            outputs=out[out_labels.index(str(i))],
            size=window_of("size", "1")[i],
            stride=window_of("stride", "1")[i],
            pad=window_of("pad", "0_0")[i],
            lhs_dilate=window_of("lhs_dilate", "1")[i],
            rhs_dilate=window_of("rhs_dilate", "1")[i],
        )
    return 2 * pairs


@functools.lru_cache(maxsize=1024)
def _meetings(
    inputs: int, outputs: int, size: int, stride: int, pad: int, lhs_dilate: int, rhs_dilate: int
) -> int:
    """Returns how many pairs of output and kernel positions meet an input, in one dimension."""
    met, end = 0, (inputs - 1) * lhs_dilate
    for k in range(size):
        shift = k * rhs_dilate - pad  # An output meets the input at output * stride + shift.
        low, high = max(0, -(shift // stride)), min(outputs - 1, (end - shift) // stride)
        if lhs_dilate == 1:
            met += max(0, high - low + 1)
        else:
            met += sum((o * stride + shift) % lhs_dilate == 0 for o in range(low, high + 1))
    return met
