"""How long a collective takes on the links of a TPU slice, or of a host of GPUs, and between them: by arithmetic.

The bound is what the chip with the fewest links has to receive. Nothing is added for contention with other traffic.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

import jax

from mlm_jax.compile.hlo import Instruction, Module, array_bytes, replica_groups, source_target_pairs
from mlm_jax.compile.topology import Topology

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# About what one hop takes whatever it carries. Source: jax-ml/scaling-book:sharding.md.
HOP_SECONDS = 1e-6


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation: what a device holds of it in full, the mesh axes that it runs over, and its time."""

    kind: str
    axes: str
    bytes: int
    seconds: float


def collective_kind(opcode: str) -> str | None:
    """Which collective an instruction is or begins, or None for any other."""
    kind = opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def measure(one: Instruction, module: Module, mesh: jax.sharding.Mesh, topology: Topology) -> Collective:
    """The collective that an instruction is or begins."""
    kind = collective_kind(one.opcode)
    assert kind is not None, f"{one.opcode} is no collective"
    given = sum(array_bytes(module.result_of(name)) for name in one.operands)
    if kind == "collective-permute":
        pairs = source_target_pairs(one.attributes)
        return Collective(kind, axes_of(pairs, mesh), given, _permute_seconds(given, pairs, mesh, topology))
    groups = replica_groups(one.attributes, mesh.size)
    size = given * len(groups[0]) if kind == "all-gather" else given
    return Collective(kind, axes_of(groups, mesh), size, _seconds(kind, size, groups[0], mesh, topology))


def between_slices(one: Instruction, topology: Topology) -> Collective | None:
    """The transfer by the hosts that XLA:TPU makes of a collective over slices, once it has run within each: a `recv`."""
    transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', one.attributes)
    if one.opcode != "recv" or not transfer:
        return None
    kind = transfer[1].lower().replace("_", "-")
    size = array_bytes(one.result.partition(", u32[]")[0])
    share = (2 if kind == "all-reduce" else 1) * (topology.num_slices - 1) / topology.num_slices
    return Collective(kind, "slice", size, share * size / topology.chip.dcn_bytes_per_second)


def lane(one: Instruction) -> str:
    """What collectives have to share to delay each other: permutations in opposite directions do not, nor do networks."""
    return "between slices" if one.opcode == "recv" else str(source_target_pairs(one.attributes))


def axes_of(groups: Sequence[Sequence[int]], mesh: jax.sharding.Mesh) -> str:
    """The mesh axes along which devices of a group differ, as `data` or `data×fsdp`."""
    sizes = tuple(mesh.shape.values())
    places = [[_unravel(device, sizes) for device in group] for group in groups]
    differing = [
        name
        for axis, name in enumerate(mesh.axis_names)
        if any(len({place[axis] for place in group}) > 1 for group in places)
    ]
    return "×".join(differing) or "none"


def _unravel(index: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    place = []
    for size in reversed(sizes):
        index, rest = divmod(index, size)
        place.append(rest)
    return tuple(reversed(place))


def _seconds(kind: str, size: int, group: Sequence[int], mesh: jax.sharding.Mesh, topology: Topology) -> float:
    """Within a slice first, then between slices what is left to each device, then back."""
    if len(group) == 1:
        return 0.0
    devices = [mesh.devices.flat[index] for index in group]
    slices = {topology.slice_of(device) for device in devices}
    inside = len(group) // len(slices)
    bandwidth, hops = _torus(devices, topology)
    passes = 2 if kind == "all-reduce" else 1
    seconds = 0.0
    if inside > 1:
        seconds += passes * ((inside - 1) / inside * size / bandwidth + hops * HOP_SECONDS)
    if len(slices) > 1:
        share = passes * (len(slices) - 1) / len(slices)
        seconds += share * size / inside / topology.chip.dcn_bytes_per_second
    return seconds


def _permute_seconds(size: int, pairs: Sequence[Sequence[int]], mesh: jax.sharding.Mesh, topology: Topology) -> float:
    """One array from each source to its target: over one link of each chip, or over the network between slices."""
    chip = topology.chip
    seconds = 0.0
    for source, target in ((mesh.devices.flat[a], mesh.devices.flat[b]) for a, b in pairs):
        if topology.slice_of(source) != topology.slice_of(target):
            seconds = max(seconds, size / chip.dcn_bytes_per_second)
            continue
        hops = 0
        for axis, whole in enumerate(topology.torus):
            steps = abs(source.coords[axis] - target.coords[axis])
            hops += min(steps, whole - steps) if whole % chip.wrap == 0 else steps
        seconds = max(seconds, size / chip.link_bytes_per_second + hops * HOP_SECONDS)
    return seconds


def _torus(devices: Sequence[jax.Device], topology: Topology) -> tuple[float, int]:
    """Bytes a second into the chip with the fewest links to the others, and the hops across the group."""
    links, hops = 0, 0
    for axis, whole in enumerate(topology.torus):
        extent = len({device.coords[axis] for device in devices})
        if extent == 1:
            continue
        ring = extent == whole and whole % topology.chip.wrap == 0
        links += 2 if ring else 1
        hops += math.ceil(extent / 2) if ring else extent - 1
    return max(1, links) * topology.chip.link_bytes_per_second, hops
