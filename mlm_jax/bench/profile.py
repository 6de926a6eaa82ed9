"""Where a step's time goes: a short trace, each operation put down to the named scope that it was written in.

Called by `bench`. The scopes are those of `model`, `objectives` and `train.step`; XLA keeps them in its HLO's metadata.
"""

import collections
import dataclasses
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

# Named scopes, and what the table calls them. The innermost one in an operation's path counts.
SCOPES = {
    "masking": "masking",
    "embedding": "embedding",
    "attention": "attention projections",
    "attention_core": "attention core",
    "mlp": "mlp",
    "norm": "norm",
    "dropout": "dropout",
    "head": "head",
    "head_loss": "head loss",
    "optimizer": "optimizer",
}
OTHER = "other"
PHASES = ("forward", "backward", "optimizer", OTHER)

# Their events span those of the operations that they run, which are counted instead.
_CONTAINERS = ("call", "conditional", "while")
_MATRIX_PRODUCTS = ("convolution", "dot")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of the optimised HLO.

    Attributes:
        op_name: the path of the JAX operation that it comes from, as jit(f)/jvp(scope)/…; empty where none is known.
        is_matrix_product: it is one, or it is a fusion that holds one.
    """

    opcode: str
    op_name: str
    is_matrix_product: bool


@dataclasses.dataclass(frozen=True)
class Operation:
    """A traced execution of an instruction."""

    start_ns: float
    end_ns: float
    instruction: str


@dataclasses.dataclass(frozen=True)
class Breakdown:
    """Seconds of `steps` traced steps, over all of them.

    Attributes:
        wall_seconds: of the traced steps, as the host saw them.
        groups: by scope, longest first. Their sum is the time in which at least one operation ran.
        backward: the part of each group that belongs to the backward pass.
        matrix_products: the part of each group that is matrix products.
        phases: the time of all groups as forward, backward and optimizer.
    """

    steps: int
    wall_seconds: float
    groups: dict[str, float]
    backward: dict[str, float]
    matrix_products: dict[str, float]
    phases: dict[str, float]

    @property
    def covered(self) -> float:
        """The share of the wall time that the groups add up to."""
        return sum(self.groups.values()) / self.wall_seconds


def profile_steps(run: Callable[[int], None], steps: int, hlo: str) -> Breakdown:
    """Traces a few steps.

    Args:
        run: executes so many steps and waits for them.
        hlo: the compiled step's own text, whose instructions the trace names.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # a record for each Python call would slow the host down
    with tempfile.TemporaryDirectory(prefix="mlm_jax_bench_") as directory:
        with jax.profiler.trace(directory, profiler_options=options):
            began = time.perf_counter()
            run(steps)
            wall_seconds = time.perf_counter() - began
        (file,) = pathlib.Path(directory).glob("**/*.xplane.pb")
        operations = read_operations(jax.profiler.ProfileData.from_file(str(file)))
    return break_down(operations, parse_hlo(hlo), steps, wall_seconds)


def break_down(
    operations: Iterable[Operation], instructions: Mapping[str, Instruction], steps: int, wall_seconds: float
) -> Breakdown:
    """Adds up the time of each group. An instruction that the HLO does not name counts as `other`."""
    unknown = Instruction("", "", False)
    leaves = [op for op in operations if instructions.get(op.instruction, unknown).opcode not in _CONTAINERS]
    groups, backward, products, phases = (collections.defaultdict[str, float](float) for _ in range(4))
    for name, seconds in shared_seconds(leaves).items():
        instruction = instructions.get(name, unknown)
        group, phase = classify(instruction.op_name)
        groups[group] += seconds
        phases[phase] += seconds
        if phase == "backward":
            backward[group] += seconds
        if instruction.is_matrix_product:
            products[group] += seconds
    return Breakdown(
        steps=steps,
        wall_seconds=wall_seconds,
        groups={group: groups[group] for group in sorted(groups, key=lambda group: -groups[group])},
        backward={group: backward[group] for group in groups},
        matrix_products={group: products[group] for group in groups},
        phases={phase: phases[phase] for phase in PHASES},
    )


def classify(op_name: str) -> tuple[str, str]:
    """The group and the phase of an operation's path.

    Differentiation writes an operation of scope `mlp` as jvp(mlp)/… in the forward pass and as transpose(jvp(mlp))/… in
    the backward pass; what is recomputed there is marked as well. An argument's path is its place in the state.
    """
    if op_name.startswith(("state.opt_state", "state.ema")):
        return "optimizer", "optimizer"
    group = next((SCOPES[part] for part in reversed(re.split(r"[/()]+", op_name)) if part in SCOPES), OTHER)
    if group == "optimizer":
        return group, "optimizer"
    if "transpose(jvp(" in op_name or "rematted_computation" in op_name:
        return group, "backward"
    if "jvp(" in op_name or group != OTHER:
        return group, "forward"
    return group, OTHER


def shared_seconds(operations: Iterable[Operation]) -> dict[str, float]:
    """Seconds of each instruction, such that all of them add up to the time in which any of them ran.

    Where several run at once, each has an equal part of that time: what runs alone holds the step up, what runs beside
    another operation does so by half.
    """
    moments = [(op.start_ns, 1, op.instruction) for op in operations]
    moments += [(op.end_ns, -1, op.instruction) for op in operations]
    moments.sort(key=lambda moment: moment[0])
    running, nanoseconds = collections.Counter[str](), collections.defaultdict[str, float](float)
    previous, count = 0.0, 0
    for time_ns, change, instruction in moments:
        if time_ns > previous:
            for name, times in running.items():
                nanoseconds[name] += (time_ns - previous) * times / count
            previous = time_ns
        running[instruction] += change
        count += change
        if not running[instruction]:
            del running[instruction]
    return {name: value / 1e9 for name, value in nanoseconds.items()}


def read_operations(profile: Any) -> list[Operation]:
    """The executed HLO instructions of a trace: of the host, or of the first accelerator, which stands for all of them.

    Operations are events with the stat `hlo_op` (CPU, GPU), or those of a line called XLA Ops (TPU), whose names begin
    with the instruction's. On a CPU the event of an operation that a thread pool goes on with covers its start only; an
    event `end: NAME`, tied to the first one by the pool's ids, tells when it was done.
    """
    host: list[Operation] = []
    for plane in sorted(profile.planes, key=lambda plane: plane.name):
        found = _operations_of_plane(plane)
        if found and plane.name.startswith("/device:"):
            return found
        host += found
    return host


def _operations_of_plane(plane: Any) -> list[Operation]:
    begun: list[tuple[Any, str, Any]] = []
    ends: dict[tuple[str, Any], float] = {}
    for line in plane.lines:
        for event in line.events:
            if event.name.startswith("end: "):
                ends[event.name.removeprefix("end: "), dict(event.stats).get("_c")] = event.start_ns
                continue
            stats = dict(event.stats)
            if "hlo_op" in stats:
                begun.append((event, stats["hlo_op"], stats.get("_p")))
            elif line.name == "XLA Ops":
                begun.append((event, event.name.lstrip("%").partition(" ")[0], None))
    found = []
    for event, instruction, link in begun:
        end_ns = max(event.start_ns + event.duration_ns, ends.get((event.name, link), 0.0))
        found.append(Operation(event.start_ns, end_ns, instruction))
    return found


_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|\s)([a-z][a-z0-9\-]*)\((?:%([\w.\-]+))?")
_OPERANDS = re.compile(r"%([\w.\-]+)")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")


@dataclasses.dataclass
class _Line:
    """What one line of HLO says. `operand` is the first one, `user` the first instruction that reads this one."""

    opcode: str
    op_name: str
    operand: str
    called: str  # a fusion's or a reduction's computation
    user: str = ""


def parse_hlo(text: str) -> dict[str, Instruction]:
    """The instructions of an optimised module by name.

    A fusion with a matrix product inside is put down to the product, which takes most of its time. What the compiler
    has inserted carries no path: a fusion then takes its result's, anything else (a copy, say) that of what reads it.
    """
    lines: dict[str, _Line] = {}
    members: dict[str, list[_Line]] = {}
    computation = ""
    for raw in text.splitlines():
        header = _COMPUTATION.match(raw)
        if header:
            computation = header[1]
            continue
        match = _INSTRUCTION.match(raw)
        opcode = _OPCODE.search(match[2]) if match else None
        if not match or not opcode:
            continue
        path, called = _OP_NAME.search(match[2]), _CALLED.search(match[2])
        lines[match[1]] = line = _Line(opcode[1], path[1] if path else "", opcode[2] or "", called[1] if called else "")
        members.setdefault(computation, []).append(line)
        for operand in _OPERANDS.findall(match[2]):
            if operand in lines and not lines[operand].user:
                lines[operand].user = match[1]

    fused_products = set()
    for name, line in lines.items():
        inside = members.get(line.called, [])
        products = [member for member in inside if member.opcode in _MATRIX_PRODUCTS]
        if products:
            fused_products.add(name)
            line.op_name = products[0].op_name or line.op_name
        line.op_name = line.op_name or next((member.op_name for member in reversed(inside) if member.op_name), "")
    found = {}
    for name, line in lines.items():
        op_name = line.op_name or _walk(lines, line, "user") or _walk(lines, line, "operand")
        # Libraries are called for some products (cuBLAS, oneDNN); only the path still tells.
        by_library = line.opcode == "custom-call" and op_name.endswith("/dot_general")
        is_product = line.opcode in _MATRIX_PRODUCTS or name in fused_products or by_library
        found[name] = Instruction(line.opcode, op_name, is_product)
    return found


def _walk(lines: Mapping[str, _Line], line: _Line, direction: str) -> str:
    """The first path found by following `user` or `operand`, or nothing within a few instructions."""
    for _ in range(8):
        following = lines.get(getattr(line, direction))
        if following is None or following.op_name:
            return following.op_name if following else ""
        line = following
    return ""
