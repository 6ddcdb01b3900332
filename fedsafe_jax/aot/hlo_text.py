"""The text of a compiled XLA module (`compiled.as_text()`) as computations and instructions."""

import math
import re
from typing import NamedTuple

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
_BITS = re.compile(r"(?:bf|[fsuc])(\d+)")
_HEADER = re.compile(r"(ENTRY )?%?([\w.$-]+) .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.$-]+) = (\(.*?\)|\S+) ([a-z][\w-]*)\(")
_END = re.compile(r"\}(, execution_thread=.*)?")
_CALLED = re.compile(
    r", (calls|to_apply|body|condition|true_computation|false_computation|branch_computations"
    r"|called_computations)=(\{[^}]*\}|%?[\w.$-]+)"
)
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')


def ints(text: str) -> tuple[int, ...]:
    """Returns the numbers in a list such as "0,2" or `["0","2"]`."""
    return tuple(int(x) for x in re.findall(r"\d+", text))


def dims(shape: str) -> tuple[int, ...]:
    """Returns the dimensions of a shape such as `bf16[4,256]{1,0}`; of a tuple, of its first."""
    return ints(_ARRAY.search(shape)[2])


def num_bytes(shape: str) -> int:
    """Returns the size of a shape such as `bf16[4,256]{1,0:T(8,128)}`, or of a tuple of shapes.

    Elements of less than a byte are packed; tokens have no size.
    """
    total = 0
    for dtype, sizes in _ARRAY.findall(shape):
        bits = 8 if dtype == "pred" else int((_BITS.match(dtype) or [0, 0])[1])
        total += -(-math.prod(ints(sizes)) * bits // 8)
    return total


def parts(shape: str) -> list[str]:
    """Returns the shapes in a tuple of shapes, tuples in it kept whole."""
    shapes, depth, begin = [], 0, 1
    for i, letter in enumerate(shape):
        depth += (letter in "([{") - (letter in ")]}")
        if (letter, depth) in ((",", 1), (")", 0)):
            shapes.append(shape[begin:i].strip())
            begin = i + 1
    return shapes


def has_scope(scope: str, op_name: str) -> bool:
    """Returns whether a `jax.named_scope` is in an op_name, bare or as in "vmap(scope)"."""
    return re.search(rf"(?<![\w.-]){re.escape(scope)}(?![\w.-])", op_name) is not None


class Instruction(NamedTuple):
    """A line `%name = shape op(operands), attributes`.

    Attributes:
      name, shape, op: as in the line.
      tail: what follows "op(".
    """

    name: str
    shape: str
    op: str
    tail: str

    def split(self) -> tuple[list[str], str]:
        """Returns the names of the operands, and the text of the attributes."""
        depth = 1
        for bracket in re.finditer(r"[()]", self.tail):
            depth += 1 if bracket[0] == "(" else -1
            if depth == 0:
                operands = re.findall(r"%([\w.$-]+)", self.tail[: bracket.start()])
                return operands, self.tail[bracket.end() :]
        raise ValueError(f"The line of {self.name} ends within its operands.")

    def operands(self) -> list[str]:
        """Returns the names of the operands."""
        return self.split()[0]

    def called(self) -> dict[str, list[str]]:
        """Returns names of computations by attribute, such as `{"body": ["region_1"]}`."""
        attributes = self.split()[1].partition(", backend_config=")[0]
        return {key: re.findall(r"[\w.$-]+", names) for key, names in _CALLED.findall(attributes)}

    def op_name(self) -> str:
        """Returns where the operation comes from in the program, "" where that is lost."""
        match = _OP_NAME.search(self.tail)
        return match[1] if match else ""


class Computation(NamedTuple):
    """A function of the module.

    Attributes:
      instructions: by name, in the order of the text.
      root: name of the result.
    """

    instructions: dict[str, Instruction]
    root: str

    def source(self, name: str) -> Instruction:
        """Returns what `name` is a copy of."""
        line = self.instructions[name]
        while line.op in ("copy", "bitcast", "convert", "reshape"):
            line = self.instructions[line.operands()[0]]
        return line

    def constant(self, name: str) -> int | None:
        """Returns the value of an integer constant or of a copy of one, None of all else."""
        source = self.source(name)
        value = re.match(r"(-?\d+)\)", source.tail)
        return int(value[1]) if source.op == "constant" and value else None

    def slot(self, name: str) -> int | None:
        """Returns the index of `name` in the tuple that a loop carries, None of all else."""
        source = self.source(name)
        if source.op != "get-tuple-element":
            return None
        [carried], attributes = source.split()
        is_carried = self.source(carried).op == "parameter"
        return int(re.search(r"index=(\d+)", attributes)[1]) if is_carried else None


class Module(NamedTuple):
    """A parsed module.

    Attributes:
      computations: by name.
      entry: name of the one that runs.
    """

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """Returns the computations of a module.

    Raises:
      ValueError: the text is no HLO module.
    """
    computations, entry, name, root = {}, "", "", ""
    instructions: dict[str, Instruction] = {}
    last = None
    for line in text.splitlines():
        if not name:
            if header := _HEADER.match(line):
                name, root, last, instructions = header[2], "", None, {}
                entry = name if header[1] else entry
        elif match := _INSTRUCTION.match(line):
            last = Instruction(*match.groups()[1:], line[match.end() :])
            root = last.name if match[1] else root
            instructions[last.name] = last
        elif _END.fullmatch(line):
            computations[name] = Computation(instructions, root)
            name = ""
        elif last:  # Attributes of kernels on TPU hold line breaks.
            last = last._replace(tail=last.tail + line)
            instructions[last.name] = last
    if entry not in computations:
        raise ValueError("This text is no compiled HLO module: it has no ENTRY computation.")
    return Module(computations, entry)


def counted_trips(module: Module, loop: Instruction, around: Computation) -> int | None:
    """Returns the trips of a `while` whose counter goes from constant to constant, else None.

    The compiler for TPU does not note the trips.

    Args:
      module: holds the loop.
      loop: the `while` instruction.
      around: the computation that it stands in.
    """
    body, condition = (module.computations[loop.called()[x][0]] for x in ("body", "condition"))
    start, after = around.source(loop.operands()[0]), body.instructions[body.root]
    test = condition.instructions[condition.root]
    comparison = re.search(r"direction=(LT|LE|GT|GE)", test.tail)
    if test.op != "compare" or not comparison or start.op != "tuple" or after.op != "tuple":
        return None
    direction = comparison[1]
    slots = [condition.slot(x) for x in test.operands()]
    # Carried along, but changed by no trip.
    is_fixed = [x is None or body.slot(after.operands()[x]) == x for x in slots]
    if all(is_fixed) or not any(is_fixed):
        return None
    bound = test.operands()[is_fixed.index(True)]
    slot, bound_slot = slots[is_fixed.index(False)], slots[is_fixed.index(True)]
    if is_fixed[0]:
        direction = direction.translate(str.maketrans("LG", "GL"))
    first = around.constant(start.operands()[slot])
    if bound_slot is None:
        last = condition.constant(bound)
    else:
        last = around.constant(start.operands()[bound_slot])
    add = body.source(after.operands()[slot])
    if add.op != "add" or slot not in map(body.slot, add.operands()):
        return None
    step = next((x for x in map(body.constant, add.operands()) if x is not None), None)
    if first is None or last is None or not step:
        return None
    distance, length = (last - first, step) if direction[0] == "L" else (first - last, -step)
    distance += direction[1] == "E"
    return max(0, -(-distance // length)) if length > 0 else None
