"""An optimised HLO module as data: its computations in their scheduled order, sizes of arrays, loops and replica groups.

Read by `compile.estimate`. What an instruction belongs to (attention, mlp, …) is told by `bench.profile.parse_hlo`.
"""

import dataclasses
import math
import re

import numpy as np

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|\s)([a-z][a-z0-9\-]*)\(")
_NAMES = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w+|c64|c128)\[([\d,]*)\](\{[^}]*\})?")
_ON_CHIP = re.compile(r"S\(\d+\)")  # in a layout: a memory space other than the device's main one
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a scheduled computation.

    Attributes:
        result: the type of what it yields, as text; arrays are counted by `array_bytes`.
        arguments: the text between the parentheses: operands, or a constant's value.
        attributes: the text after them.
        is_root: it is the computation's result.
    """

    name: str
    opcode: str
    result: str
    arguments: str
    attributes: str
    is_root: bool

    @property
    def operands(self) -> list[str]:
        """The names of what it reads, in order."""
        return _NAMES.findall(self.arguments)

    @property
    def cycles(self) -> int | None:
        """What the compiler's cost model expects, where it says so (XLA:TPU). All bits set are no number."""
        match = _CYCLES.search(self.attributes)
        return int(match[1]) if match and int(match[1]) < 2**63 else None

    def attribute(self, name: str) -> str:
        """A computation or a word that is given as name=…, or nothing."""
        match = re.search(rf"\b{name}=%?\"?([\w.$\-]+)", self.attributes)
        return match[1] if match else ""


@dataclasses.dataclass(frozen=True)
class Module:
    """Computations by name, each a list of instructions in their order of execution."""

    computations: dict[str, list[Instruction]]
    entry: str

    def result_of(self, name: str) -> str:
        """The type of an instruction's result."""
        return self._results.get(name, "")

    def by_name(self, computation: str) -> dict[str, Instruction]:
        """The instructions of a computation."""
        return {one.name: one for one in self.computations.get(computation, [])}

    def __post_init__(self) -> None:
        results = {one.name: one.result for body in self.computations.values() for one in body}
        object.__setattr__(self, "_results", results)

    _results: dict[str, str] = dataclasses.field(init=False, repr=False, default_factory=dict)


def parse_module(text: str) -> Module:
    """Reads `compiled.as_text()`, an instruction to a line."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", ""
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            current = header[2]
            computations[current] = []
            entry = current if header[1] else entry
        elif current:
            parsed = _parse_instruction(line)
            if parsed:
                computations[current].append(parsed)
    return Module(computations, entry)


def join_lines(text: str) -> str:
    """The module with every instruction on one line: a Pallas kernel's metadata brings line breaks of its own."""
    return re.sub(r'\n(?="|\}\})', "", text)


def _parse_instruction(line: str) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    opcode = _OPCODE.search(match[3]) if match else None
    if not match or not opcode:
        return None
    body = match[3]
    depth, end = 1, opcode.end()
    while depth and end < len(body):
        depth += {"(": 1, ")": -1}.get(body[end], 0)
        end += 1
    return Instruction(match[2], opcode[1], body[: opcode.start()], body[opcode.end() : end - 1], body[end:], bool(match[1]))


def array_shapes(type_text: str) -> list[tuple[str, tuple[int, ...]]]:
    """The dtype and the shape of each array of a type, be it an array or a tuple."""
    return [(dtype, _sizes(shape)) for dtype, shape, _ in _ARRAY.findall(type_text)]


def array_bytes(type_text: str, *, of_main_memory: bool = False) -> int:
    """Bytes of a type's arrays, without the padding of their layouts; on request only of those that lie in main memory."""
    return sum(
        math.prod(_sizes(shape)) * _item_bytes(dtype)
        for dtype, shape, layout in _ARRAY.findall(type_text)
        if not (of_main_memory and _ON_CHIP.search(layout))
    )


def _sizes(shape: str) -> tuple[int, ...]:
    return tuple(int(size) for size in shape.split(",") if size)


def _item_bytes(dtype: str) -> int:
    if dtype == "pred" or dtype.startswith("f8"):
        return 1
    bits = int(re.sub(r"\D", "", dtype))
    return max(1, bits // 8)


def trip_count(module: Module, loop: Instruction) -> int | None:
    """How often a `while` runs its body, or None where it cannot be read.

    Loops count from a constant in constant steps up to a constant that the condition compares with. JAX's scans step by 1;
    the compiler unrolls some loops of its own, which then step by 2.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    condition = module.by_name(loop.attribute("condition"))
    body = module.by_name(loop.attribute("body"))
    compares = [one for one in condition.values() if one.opcode == "compare" and "direction=LT" in one.attributes]
    roots = [one for one in body.values() if one.is_root and one.opcode == "tuple"]
    if len(compares) != 1 or not roots:
        return None
    counter, limit = (condition.get(name) for name in compares[0].operands)
    index = re.search(r"index=(\d+)", counter.attributes) if counter else None
    update = body.get(roots[0].operands[int(index[1])]) if index else None
    if limit is None or limit.opcode != "constant" or index is None or update is None or update.opcode != "add":
        return None
    steps = [int(body[name].arguments) for name in update.operands if name in body and body[name].opcode == "constant"]
    start = _start(module, loop, int(index[1]))
    if len(steps) != 1 or start is None:
        return None
    return max(0, math.ceil((int(limit.arguments) - start) / steps[0]))


def _start(module: Module, loop: Instruction, index: int) -> int | None:
    """The constant that an element of a loop's first tuple is."""
    around = next((body for body in module.computations.values() if loop in body), [])
    named = {one.name: one for one in around}
    first = named.get(loop.operands[0])
    found = named.get(first.operands[index]) if first and first.opcode == "tuple" else None
    while found and found.opcode == "copy":
        found = named.get(found.operands[0])
    return int(found.arguments) if found and found.opcode == "constant" else None


def replica_groups(attributes: str, num_devices: int) -> list[list[int]]:
    """The groups of devices that a collective runs among, from any of HLO's three notations.

    They are {{0,1},{2,3}}; [2,2]<=[4] or [2,2]<=[2,2]T(1,0); and mesh['a'=2,'b'=2] {'a'}. None given is all devices.
    """
    listed = re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", attributes)
    if listed:
        return [[int(one) for one in group.split(",")] for group in re.findall(r"\{([\d, ]+)\}", listed[1])]
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        shape, source = (tuple(map(int, iota[index].split(","))) for index in (1, 2))
        ids = np.arange(math.prod(source)).reshape(source)
        if iota[3]:
            ids = ids.transpose(tuple(map(int, iota[3].split(","))))
        return ids.reshape(shape).tolist()
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes)
    if mesh:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        within = re.findall(r"'([^']+)'", mesh[2])
        ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        moved = [list(sizes).index(name) for name in within]
        rest = [axis for axis in range(ids.ndim) if axis not in moved]
        size = math.prod(sizes[name] for name in within)
        return ids.transpose((*rest, *moved)).reshape(-1, size).tolist()
    return [list(range(num_devices))]


def source_target_pairs(attributes: str) -> list[list[int]]:
    """Who sends to whom in a collective-permute."""
    match = re.search(r"source_target_pairs=\{(\{[\d,{} ]*\})\}", attributes)
    return [[int(one) for one in pair.split(",")] for pair in re.findall(r"\{([\d, ]+)\}", match[1])] if match else []
