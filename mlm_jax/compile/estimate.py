"""A step's time as the compiler's cost model has it, with arithmetic for what that leaves out: an estimate, never a
measurement.

The schedule of the optimised HLO is walked once: every instruction adds its estimated cycles; a loop's body counts as
often as it runs. Attention kernels, and instructions that carry no cycles (on a GPU, all), get a bound by arithmetic instead
(`cost`); so do collectives (`links`). A collective that runs beside others costs only what they do not hide.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping

import jax

from mlm_jax import flops
from mlm_jax.bench import profile
from mlm_jax.compile.cost import is_kernel, kernel_flops, product_flops, traffic
from mlm_jax.compile.hlo import Instruction, Module, join_lines, parse_module, trip_count
from mlm_jax.compile.links import Collective, between_slices, collective_kind, lane, measure
from mlm_jax.compile.topology import Topology

Seconds = collections.defaultdict[str, float]
COLLECTIVES = "collectives"
# These move no data, or do so while others run.
FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id"),
    *("copy-start", "copy-done", "slice-start", "slice-done", "optimization-barrier", "send", "send-done"),
)


@dataclasses.dataclass
class Timeline:
    """Seconds of one device's step.

    Attributes:
        groups: by what the work belongs to; all of them together are the step.
        backward, products: the part of each group that is the backward pass; that is matrix products.
        kernels: the part of all groups that is attention kernels, by their products.
        roofline: the part that is instructions without cycles, by their products or their memory traffic.
        collectives: how often each one runs in a step.
        unknown: what could not be counted, by kind.
    """

    groups: Seconds = dataclasses.field(default_factory=lambda: Seconds(float))
    backward: Seconds = dataclasses.field(default_factory=lambda: Seconds(float))
    products: Seconds = dataclasses.field(default_factory=lambda: Seconds(float))
    kernels: float = 0.0
    roofline: float = 0.0
    collectives: collections.Counter[Collective] = dataclasses.field(default_factory=collections.Counter)
    unknown: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    @property
    def seconds(self) -> float:
        return sum(self.groups.values())

    def add(self, other: "Timeline", times: int) -> None:
        """Appends another timeline, repeated."""
        for name in ("groups", "backward", "products", "collectives", "unknown"):
            mine = getattr(self, name)
            for key, value in getattr(other, name).items():
                mine[key] += value * times
        self.kernels += other.kernels * times
        self.roofline += other.roofline * times


class Estimator:
    """Prices the instructions of one module for a topology."""

    def __init__(
        self, module: Module, owners: Mapping[str, profile.Instruction], mesh: jax.sharding.Mesh, topology: Topology
    ):
        self.module, self.owners, self.mesh, self.topology = module, owners, mesh, topology
        peak = flops.device_peak_flops(topology.devices[0])
        assert peak is not None, f"no peak is known of {topology.devices[0].device_kind}"
        self.peak = peak
        self.clock = peak / topology.chip.flops_per_cycle if topology.chip.flops_per_cycle else math.inf

    def step(self) -> Timeline:
        """The whole entry computation."""
        return self._walk(self.module.entry)

    def _walk(self, computation: str) -> Timeline:
        line, pending = Timeline(), _Pending()
        for one in self.module.computations[computation]:
            if one.opcode == "while":
                count = trip_count(self.module, one)
                if count is None:
                    line.unknown["loops counted once"] += 1
                line.add(self._walk(one.attribute("body")), 1 if count is None else count)
            elif one.opcode == "call":
                line.add(self._walk(one.attribute("to_apply")), 1)
            elif one.opcode == "conditional":
                line.unknown["conditionals counted as free"] += 1
            elif one.opcode not in FREE and not self._communicate(one, line, pending):
                self._price(one, line)
        return line

    def _communicate(self, one: Instruction, line: Timeline, pending: "_Pending") -> bool:
        """Accounts for a collective that begins, ends or runs here; False where the instruction is to be priced as well.

        XLA:TPU fuses collectives: a start, computations that carry them along, and a done, all of one channel.
        """
        transfer = between_slices(one, self.topology)
        if transfer:
            line.collectives[transfer] += 1
            pending.begin((one.name,), lane(one), transfer.seconds, line)
            return True
        fused = one.opcode in ("fusion", "async-start")
        body = self.module.computations.get(one.attribute("calls"), []) if fused else [one]
        inner = next((member for member in body if collective_kind(member.opcode)), None)
        if inner is None:
            return one.opcode.endswith("-done") and bool(one.operands) and pending.wait(one.operands[0], line)
        channel = inner.attribute("channel_id") or one.name
        marks = {member.attribute("custom_call_target") for member in body}
        if "AsyncCollectiveDone" in marks:
            return pending.wait(channel, line)
        if one.opcode == "fusion" and channel in pending.finish:
            return False
        if one.opcode == "fusion" and inner.opcode == "all-reduce" and any(m.opcode == "dynamic-slice" for m in body):
            inner = dataclasses.replace(inner, opcode="reduce-scatter")
        found = measure(inner, self.module, self.mesh, self.topology)
        line.collectives[found] += 1
        pending.begin((one.name, channel), lane(inner), found.seconds, line)
        if not one.opcode.endswith("-start") and "AsyncCollectiveStart" not in marks:
            pending.wait(one.name, line)
            return one.cycles is None
        return True

    def _price(self, one: Instruction, line: Timeline) -> None:
        owner = self.owners.get(one.name, profile.Instruction(one.opcode, "", False))
        group, phase = _classify(one, owner.op_name)
        chip = self.topology.chip
        if one.cycles is not None:
            seconds = one.cycles / self.clock
        elif is_kernel(one):
            found = kernel_flops(one, self.module)
            if found is None:
                line.unknown["kernels counted as free"] += 1
                return
            operations, head_dim = found
            seconds = operations / (self.peak * chip.fill(head_dim))
            line.kernels += seconds
        elif one.opcode == "custom-call":
            if "__cublas" in one.attributes:
                line.unknown["products of a library counted as free"] += 1
            return  # else the compiler's own: buffers and hints
        else:
            moved = traffic(one, self.module) / chip.hbm_bytes_per_second
            seconds = max(moved, product_flops(one, self.module) / self.peak)
            line.roofline += seconds
        line.groups[group] += seconds
        if phase == "backward":
            line.backward[group] += seconds
        if owner.is_matrix_product:
            line.products[group] += seconds


@dataclasses.dataclass
class _Pending:
    """When the collectives that were begun are done, and when each lane of the links is free again, in seconds."""

    finish: dict[str, float] = dataclasses.field(default_factory=dict)
    free: Seconds = dataclasses.field(default_factory=lambda: Seconds(float))

    def begin(self, names: Iterable[str], where: str, seconds: float, line: Timeline) -> None:
        """Runs a collective on a lane as soon as that is free; it is known under several names."""
        self.free[where] = max(line.seconds, self.free[where]) + seconds
        self.finish.update(dict.fromkeys(names, self.free[where]))

    def wait(self, name: str, line: Timeline) -> bool:
        """Waits for a collective; False where none of that name was begun."""
        if name not in self.finish:
            return False
        line.groups[COLLECTIVES] += max(0.0, self.finish[name] - line.seconds)
        return True


def _classify(one: Instruction, op_name: str) -> tuple[str, str]:
    """The group and the phase, as `bench` has them, and some groups for what belongs to no scope."""
    group, phase = profile.classify(op_name)
    if group == profile.OTHER:
        if one.opcode == "rng-bit-generator":
            group = "dropout"
        elif "while/body" in op_name and "dynamic_" in op_name:
            group = "scan storage"  # what a scan over the layers keeps for the backward pass, and its reading
        elif op_name.endswith("convert_element_type"):
            group = "casts"
    return group, phase


def estimate_step(hlo: str, mesh: jax.sharding.Mesh, topology: Topology) -> Timeline:
    """Walks the schedule of `compiled.as_text()`."""
    hlo = join_lines(hlo)
    return Estimator(parse_module(hlo), profile.parse_hlo(hlo), mesh, topology).step()
