"""What a compiled program does in one call: FLOPs, estimated cycles, collectives and kernels, read from its HLO text.

XLA's own `cost_analysis()` counts the body of a loop once, leaves collectives and Pallas kernels out, and can be negative (see docs/scale.md). The walk
here multiplies what a loop holds by the number of its rounds; FLOPs are those of matrix products and convolutions, two for a multiply-add, as the
compiler will run them: recomputation counts. Everything is per device.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all", "collective-broadcast")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
_COMPUTATION = re.compile(r"(?:(ENTRY)\s+)?%?([\w.\-]+)\s+\(.*\)\s*->\s*.*\{\s*$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT\s+)?%?([\w.\-]+)\s+=\s+(.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_OPCODE = re.compile(r"\s([a-z][\w\-]*)\(")
_CALLED = re.compile(r"\b(?:calls|to_apply|called_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}|\b(?:true|false)_computation=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction of the text: its opcode, the arrays of its result as (type, dimensions), the names of its operands, the text after them."""

    name: str
    opcode: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    operands: tuple[str, ...]
    rest: str
    arguments: str

    @property
    def bytes(self) -> int:
        """Bytes of the result."""
        return sum(array_bytes(kind, dims) for kind, dims in self.arrays)


@dataclasses.dataclass(frozen=True)
class Collective:
    """Calls of one kind of collective over groups of one form, in one call of the program; bytes are those of the results of one device.

    `members` are the devices of the first group by their places in the mesh, of a permutation those of its first move; none = all devices.
    """

    kind: str
    members: tuple[int, ...]
    calls: int
    bytes: int
    largest: int  # bytes of the largest single call


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one call of a program costs one device.

    `cycles` are the compiler's estimates (TPU alone, else 0): they leave out kernels and the time of collectives. `kernels` are calls by name of what is
    not told in the program: Pallas kernels, NVIDIA's libraries.
    """

    flops: int
    cycles: int
    collectives: tuple[Collective, ...]
    kernels: dict[str, int]
    asynchronous: int  # collectives, of all calls, that something else may run beside
    unknown_loops: int  # loops whose rounds could not be read: counted once
    windowed: int  # rounds of loops that pass a product's operand around piece by piece

    @property
    def collective_bytes(self) -> int:
        return sum(entry.bytes for entry in self.collectives)


def array_bytes(kind: str, dims: tuple[int, ...]) -> int:
    """Bytes of an array of an HLO type, such as bf16."""
    digits = re.search(r"\d+", kind)
    bits = _BITS[kind] if kind in _BITS else int(digits[0]) if digits else 0
    return math.prod(dims) * bits // 8


class Program:
    """The computations of an HLO text by name, each a table of its instructions."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.roots: dict[str, Instruction] = {}
        self.entry = ""
        current: dict[str, Instruction] | None = None
        name = ""
        for line in _whole_lines(text):
            if header := _COMPUTATION.match(line):
                name, current = header[2], {}
                self.computations[name] = current
                if header[1]:
                    self.entry = name
            elif current is not None and (found := _INSTRUCTION.match(line)):
                instruction = _parse(found[1], found[2])
                if instruction is not None:
                    current[instruction.name] = instruction
                    if line.lstrip().startswith("ROOT"):
                        self.roots[name] = instruction

    def dims(self, computation: str, instruction: Instruction, operand: int) -> tuple[int, ...]:
        """Dimensions of an operand, from the text of the call or from where it is made."""
        typed = _ARRAY.findall(instruction.arguments)
        if len(typed) == len(instruction.operands):
            return _dims(typed[operand][1])
        return self.computations[computation][instruction.operands[operand]].arrays[0][1]


def _whole_lines(text: str) -> Iterator[str]:
    """Lines, those that are broken within an instruction (the metadata of kernels holds newlines) joined again."""
    held = ""
    for line in text.splitlines():
        if held and (_COMPUTATION.match(line) or _INSTRUCTION.match(line)):
            yield held
            held = ""
        if _INSTRUCTION.match(line):
            held = line
        elif held:
            held += " " + line
        else:
            yield line
    if held:
        yield held


def _dims(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(",") if size)


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if not depth:
            return place
    return len(text)


def _parse(name: str, body: str) -> Instruction | None:
    # A result of several arrays is in parentheses, and layouts hold some too: T(8,128).
    start = _closing(body, 0) if body.startswith("(") else 0
    opcode = _OPCODE.search(body, start)
    if opcode is None:
        return None
    opens = opcode.end() - 1
    closes = _closing(body, opens)
    arguments = body[opens + 1 : closes]
    arrays = tuple((kind, _dims(dims)) for kind, dims in _ARRAY.findall(body[: opcode.start()]))
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments)) or tuple(re.findall(r"([a-zA-Z][\w.\-]*)\s*(?:,|$)", arguments))
    return Instruction(name, opcode[1], arrays, operands, body[closes + 1 :], arguments)


def _listed(rest: str, key: str) -> tuple[int, ...]:
    found = re.search(rf"\b{key}=\{{([\d,]*)\}}", rest)
    return _dims(found[1]) if found else ()


def _dot_flops(program: Program, computation: str, instruction: Instruction) -> int:
    left = program.dims(computation, instruction, 0)
    contracted = math.prod(left[dim] for dim in _listed(instruction.rest, "lhs_contracting_dims"))
    return 2 * math.prod(instruction.arrays[0][1]) * contracted


def _window(rest: str, count: int) -> dict[str, list]:
    """The window of a convolution: size, stride, padding and dilations of each spatial dimension."""
    text = found[1] if (found := re.search(r"\bwindow=\{([^}]*)\}", rest)) else ""
    given = dict(part.split("=") for part in text.split())

    def ints(key: str) -> list[int]:
        return [int(value) for value in given[key].split("x")] if key in given else [1] * count

    pad = [tuple(map(int, value.split("_"))) for value in given["pad"].split("x")] if "pad" in given else [(0, 0)] * count
    return {"size": ints("size"), "stride": ints("stride"), "pad": pad, "base": ints("lhs_dilate"), "step": ints("rhs_dilate")}


def _convolution_flops(program: Program, computation: str, instruction: Instruction) -> int:
    """Multiply-adds x 2 at places that are no padding; the TPU compiler writes batched products as convolutions over padded windows."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    left, right = (program.dims(computation, instruction, operand) for operand in (0, 1))
    out, lhs, rhs, result = instruction.arrays[0][1], *labels.groups()
    groups = int(found[1]) if (found := re.search(r"batch_group_count=(\d+)", instruction.rest)) else 1
    spatial = [label for label in result if label.isdigit()]
    window, pairs = _window(instruction.rest, len(spatial)), 1
    for n, label in enumerate(sorted(spatial)):
        base, size = left[lhs.index(label)], right[rhs.index(label)]
        extent, low = (base - 1) * window["base"][n] + 1, window["pad"][n][0]
        starts = (o * window["stride"][n] - low for o in range(out[result.index(label)]))
        offsets = [k * window["step"][n] for k in range(size)]
        pairs *= sum(0 <= start + offset < extent and (start + offset) % window["base"][n] == 0 for start in starts for offset in offsets)
    return 2 * pairs * right[rhs.index("i")] * out[result.index("f")] * out[result.index("b")] // groups


def _rounds(program: Program, instruction: Instruction) -> int | None:
    """How often a loop goes round: as the compiler says, else from the bound that its condition holds and the step that its body makes."""
    if known := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', instruction.rest):
        return int(known[1])
    condition, body = (re.search(rf"\b{key}=%?([\w.\-]+)", instruction.rest)[1] for key in ("condition", "body"))
    bounds = [bound for bound in _constants(program, condition) if bound > 0]
    if not bounds:
        return None
    steps = {step for step in _steps(program, body, condition) if step > 0}
    return -(-max(bounds) // (min(steps) if steps else 1))


def _constants(program: Program, computation: str) -> list[int]:
    """Whole-number constants of a computation and of what it calls."""
    found = []
    for instruction in program.computations[computation].values():
        if instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.arguments.strip()) and instruction.arrays[0][0] in ("s32", "u32", "s64", "u64"):
            found.append(int(instruction.arguments))
        for name in _CALLED.findall(instruction.rest):
            found += _constants(program, name)
    return found


def _steps(program: Program, body: str, condition: str) -> list[int]:
    """What the body adds to the counter that the condition looks at."""
    index = [int(found[1]) for found in (re.search(r"\bindex=(\d+)", entry.rest) for entry in program.computations[condition].values()) if found]
    root = program.roots[body]
    if not index or root.opcode != "tuple" or index[0] >= len(root.operands):
        return []
    made = program.computations[body][root.operands[index[0]]]
    if made.opcode == "add":
        sources = [program.computations[body][name] for name in made.operands if name in program.computations[body]]
        return [int(entry.arguments) for entry in sources if entry.opcode == "constant"]
    return [step for name in _CALLED.findall(made.rest) for step in _constants(program, name)]


def _members(rest: str) -> tuple[int, ...]:
    """The devices of the first group of a collective, or of its first move to another device."""
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\](?:,\s*device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?\s*\{([^}]*)\}", rest):
        sizes = {axis: int(size) for axis, size in re.findall(r"'?(\w+)'?=(\d+)", named[1])}
        chosen = [axis for axis in re.findall(r"\w+", named[4]) if axis in sizes]
        places = np.arange(math.prod(sizes.values())).reshape(_dims(named[2]) if named[2] else -1)
        places = (places.transpose(_dims(named[3])) if named[3] else places).reshape(tuple(sizes.values()))
        return tuple(places[tuple(slice(None) if axis in chosen else 0 for axis in sizes)].flatten().tolist())
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        dims = _dims(iota[3])
        places = np.arange(math.prod(dims)).reshape(dims)
        if iota[4]:
            places = places.transpose(_dims(iota[4]))
        return tuple(places.reshape(int(iota[1]), int(iota[2]))[0].tolist())
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return _dims(listed[1])
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", rest):
        moves = [_dims(pair) for pair in re.findall(r"\{([\d,]+)", pairs[0])]
        return next((move for move in moves if move[0] != move[1]), ())
    return ()


class _Walk:
    def __init__(self, program: Program):
        self.program = program
        self.calls: dict[tuple, tuple[str, tuple[int, ...], int, int]] = {}  # (channel or place) -> kind, members, calls, bytes of one
        self.kernels: collections.Counter[str] = collections.Counter()
        self.flops = self.cycles = self.asynchronous = self.unknown = self.windowed = 0

    def computation(self, name: str, times: int, *, fused: bool = False) -> None:
        for instruction in self.program.computations[name].values():
            self.instruction(name, instruction, times, fused)

    def instruction(self, computation: str, instruction: Instruction, times: int, fused: bool) -> None:
        opcode, rest = instruction.opcode, instruction.rest
        if opcode == "dot":
            self.flops += times * _dot_flops(self.program, computation, instruction)
        elif opcode == "convolution":
            self.flops += times * _convolution_flops(self.program, computation, instruction)
        elif opcode == "custom-call" and (kernel := _kernel(rest)):
            self.kernels[kernel] += times
        elif opcode.removesuffix("-start") in COLLECTIVES:
            self.collective(computation, instruction, times)
        if not fused and (cycles := re.search(r'"estimated_cycles":"?(\d+)', rest)):
            self.cycles += times * int(cycles[1])
        if opcode == "while":
            self.loop(instruction, times)
        elif opcode == "conditional":
            branches = [name for found in _BRANCHES.findall(rest) for name in re.findall(r"[\w.\-]+", " ".join(found))]
            self.largest(branches, times)
        elif opcode not in ("reduce", "reduce-window", "scatter", "select-and-scatter", "sort", "map") and opcode.removesuffix("-start") not in COLLECTIVES:
            for name in _CALLED.findall(rest):
                self.computation(name, times, fused=fused or opcode == "fusion")

    def loop(self, instruction: Instruction, times: int) -> None:
        rounds = _rounds(self.program, instruction)
        if rounds is None:
            self.unknown, rounds = self.unknown + 1, 1
        if "windowed_dot_general" in instruction.rest or "windowed_dot_general" in instruction.name:
            self.windowed += times * rounds
        self.computation(re.search(r"\bbody=%?([\w.\-]+)", instruction.rest)[1], times * rounds)

    def largest(self, branches: list[str], times: int) -> None:
        """Of a choice, the branch with the most FLOPs."""
        walks = [_Walk(self.program) for _ in branches]
        for walk, name in zip(walks, branches):
            walk.computation(name, 1)
        if walks:
            self.computation(branches[max(range(len(walks)), key=lambda n: (walks[n].flops, walks[n].cycles))], times)

    def collective(self, computation: str, instruction: Instruction, times: int) -> None:
        kind, arrays = instruction.opcode.removesuffix("-start"), instruction.arrays
        if instruction.opcode.endswith("-start"):
            self.asynchronous += times
            if kind != "all-reduce":  # operands stand before results
                arrays = arrays[len(instruction.operands) : 2 * len(instruction.operands)] or arrays
        size = sum(array_bytes(*array) for array in arrays)
        # An asynchronous fusion holds the same collective at its start, in its middle and at its end.
        channel = re.search(r"channel_id=(\d+)", instruction.rest)
        key = ("channel", channel[1]) if channel else (computation, instruction.name)
        if key not in self.calls or self.calls[key][2] < times:
            self.calls[key] = (kind, _members(instruction.rest), times, size)


def _kernel(rest: str) -> str | None:
    """The name of a kernel, of Pallas or NVIDIA's libraries, that a custom call runs; None for other calls."""
    target = re.search(r'custom_call_target="([^"]*)"', rest)
    if target is None or not re.search(r"tpu_custom_call|mosaic|triton|__cudnn\$|__cublas\$", target[1]):
        return None
    if target[1].startswith("__cu"):
        return target[1].strip("_")
    name = re.search(r'"?kernel_name"?\s*[:=]\s*\\?"([^"\\]+)', rest) or re.search(r'op_name="(?:[^"]*/)?([^"/]+)"', rest)
    return name[1] if name else target[1]


def cost(text: str) -> Cost:
    """The cost of one call of a compiled program, given its `as_text()`."""
    program = Program(text)
    walk = _Walk(program)
    walk.computation(program.entry, 1)
    table: dict[tuple[str, tuple[int, ...]], list[tuple[int, int]]] = {}
    for kind, members, calls, size in walk.calls.values():
        table.setdefault((kind, members), []).append((calls, size))
    collectives = tuple(
        Collective(kind, members, sum(n for n, _ in entries), sum(n * size for n, size in entries), max(size for _, size in entries))
        for (kind, members), entries in sorted(table.items())
    )
    return Cost(walk.flops, walk.cycles, collectives, dict(walk.kernels), walk.asynchronous, walk.unknown, walk.windowed)
