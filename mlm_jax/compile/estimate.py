"""A step's time as the compiler's cost model has it, with arithmetic for what that leaves out: an estimate, never a
measurement.

The schedule of the optimised HLO is walked once: every instruction adds its estimated cycles; a loop's body counts as
often as it runs. Three things carry no cycles and get a bound by arithmetic instead: Pallas kernels (`kernels`), collectives
over the links (`links`), and instructions that only move memory. A collective that runs beside others costs only what they
do not hide.
"""

import collections
import dataclasses
import re
from collections.abc import Mapping

import jax

from mlm_jax import flops
from mlm_jax.bench import profile
from mlm_jax.compile.hlo import Instruction, Module, array_bytes, array_shapes, join_lines, parse_module, trip_count
from mlm_jax.compile.links import Collective, collective_kind, lane, measure
from mlm_jax.compile.topology import Topology

Seconds = collections.defaultdict[str, float]
COLLECTIVES = "collectives"
# Matrix products of [L, K] by [K, M] or [L, M] by [M, K] that each splash kernel runs for a head: scores and mix in the
# forward pass; scores, dP, dV and dK; scores, dP and dQ.
SPLASH_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dkv": 4, "splash_mha_dq": 3}
# These move no data, or do so while others run.
FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id"),
    *("copy-start", "copy-done", "slice-start", "slice-done", "optimization-barrier"),
)


@dataclasses.dataclass
class Timeline:
    """Seconds of one device's step.

    Attributes:
        groups: by what the work belongs to; all of them together are the step.
        backward, products: the part of each group that is the backward pass; that is matrix products.
        kernels: the part of all groups that is Pallas kernels, by arithmetic.
        moved: the part that is instructions without cycles, as their bytes over the memory's bandwidth.
        collectives: how often each one runs in a step.
        unknown: what could not be counted, by kind.
    """

    groups: Seconds = dataclasses.field(default_factory=lambda: Seconds(float))
    backward: Seconds = dataclasses.field(default_factory=lambda: Seconds(float))
    products: Seconds = dataclasses.field(default_factory=lambda: Seconds(float))
    kernels: float = 0.0
    moved: float = 0.0
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
        self.moved += other.moved * times


class Estimator:
    """Prices the instructions of one module for a topology."""

    def __init__(
        self, module: Module, owners: Mapping[str, profile.Instruction], mesh: jax.sharding.Mesh, topology: Topology
    ):
        self.module, self.owners, self.mesh, self.topology = module, owners, mesh, topology
        peak = flops.device_peak_flops(topology.devices[0])
        assert peak is not None, f"no peak is known of {topology.devices[0].device_kind}"
        self.peak = peak
        self.clock = peak / topology.chip.flops_per_cycle

    def step(self) -> Timeline:
        """The whole entry computation."""
        return self._walk(self.module.entry)

    def _walk(self, computation: str) -> Timeline:
        line = Timeline()
        free, finish = Seconds(float), dict[str, float]()  # when a lane is free again, when a collective is done
        for one in self.module.computations[computation]:
            kind = collective_kind(one.opcode)
            if one.opcode == "while":
                count = trip_count(self.module, one)
                if count is None:
                    line.unknown["loops counted once"] += 1
                line.add(self._walk(one.attribute("body")), 1 if count is None else count)
            elif one.opcode == "call":
                line.add(self._walk(one.attribute("to_apply")), 1)
            elif kind:
                found = measure(one, self.module, self.mesh, self.topology)
                line.collectives[found] += 1
                finish[one.name] = free[lane(one)] = max(line.seconds, free[lane(one)]) + found.seconds
                if not one.opcode.endswith("-start"):
                    line.groups[COLLECTIVES] += finish[one.name] - line.seconds
            elif one.opcode.endswith("-done") and one.operands and one.operands[0] in finish:
                line.groups[COLLECTIVES] += max(0.0, finish[one.operands[0]] - line.seconds)
            elif one.opcode not in FREE:
                self._price(one, line)
        return line

    def _price(self, one: Instruction, line: Timeline) -> None:
        owner = self.owners.get(one.name, profile.Instruction(one.opcode, "", False))
        group, phase = _classify(one, owner.op_name)
        cycles = one.cycles
        if cycles is not None:
            seconds = cycles / self.clock
        elif one.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in one.attributes:
            seconds = self._kernel_seconds(one, line)
            line.kernels += seconds
        elif one.opcode == "custom-call":
            return  # the compiler's own: buffers and hints
        else:
            seconds = self._moved_bytes(one) / self.topology.chip.hbm_bytes_per_second
            line.moved += seconds
        line.groups[group] += seconds
        if phase == "backward":
            line.backward[group] += seconds
        if owner.is_matrix_product:
            line.products[group] += seconds

    def _moved_bytes(self, one: Instruction) -> int:
        """Written and read, of what lies in the device's memory. Of an operand no more is read than is written."""
        if one.opcode == "dynamic-update-slice":
            return 2 * array_bytes(self.module.result_of(one.operands[1]), of_main_memory=True)
        written = array_bytes(one.result)
        read = sum(min(written, array_bytes(self.module.result_of(name), of_main_memory=True)) for name in one.operands)
        return array_bytes(one.result, of_main_memory=True) + read

    def _kernel_seconds(self, one: Instruction, line: Timeline) -> float:
        """A splash kernel's matrix products at the share of the peak that its head dimension fills of a matrix unit."""
        products = next((count for name, count in SPLASH_PRODUCTS.items() if one.name.startswith(name)), None)
        heads = [shape for name in one.operands for _, shape in array_shapes(self.module.result_of(name)) if len(shape) == 4]
        if products is None or len(heads) < 3:
            line.unknown["kernels counted as free"] += 1
            return 0.0
        if re.search(r'use_fused_bwd_kernel\\?": true', one.attributes) and one.name.startswith("splash_mha_dkv"):
            products += 1  # dQ as well
        (batch, count, length, dim), (_, _, keys, _) = heads[0], heads[1]
        fill = min(1.0, dim / self.topology.chip.mxu_width)
        return products * 2.0 * batch * count * length * keys * dim / (self.peak * fill)


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
