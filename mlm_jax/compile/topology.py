"""Topologies by name, as devices to compile for on a machine that has none, and what is known of their chips.

`v5e:4x4` is one slice of TPU v5e; `2x v5e:16x16` two of them. A device is what JAX calls one: a chip, but for TPU7x,
which has two.
"""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

from mlm_jax.errors import UserError

# Set before JAX is imported: no accelerator of this machine is touched and none is looked for in the network; two
# processes may load libtpu at once; and as JAX can write what it compiles for absent devices into its compilation cache but
# not read it from there, it does neither.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v4-8",  # of a host that is not asked for; without one libtpu warns
    "TPU_WORKER_HOSTNAMES": "localhost",
}
EXAMPLES = "v4:2x2x2, v5e:4x4, v5e:16x16, v5p:4x4x4, v6e:16x16, tpu7x:2x2x1, or 2x v5e:16x16 for two slices"


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device of a TPU generation.

    Attributes:
        hbm_bytes: what XLA may plan with; `available HBM` in the compiler's own message when memory runs out.
        hbm_bytes_per_second, link_bytes_per_second, dcn_bytes_per_second: of the device's memory; of one ICI link in one
            direction; of the device's part of its host's network.
        flops_per_cycle: of the matrix units. With the peak of `mlm_jax.flops` it gives the clock.
        mxu_width: the side of a matrix unit, which a shorter contraction fills in part only.
        wrap: a dimension of the torus is a ring when it has a multiple of so many chips.
    """

    hbm_bytes: float
    hbm_bytes_per_second: float
    link_bytes_per_second: float
    dcn_bytes_per_second: float
    flops_per_cycle: int
    mxu_width: int
    wrap: int


GiB = 2**30
# Sources: bandwidths of memory, links and network from docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, where ICI
# is given for a chip in both directions: the 400 GB/s of v5e are 4 ports of 50 GB/s each way. Rings: v5e and v6e close a
# dimension of 16 chips, the others every multiple of 4. Matrix units: 4 of 128x128 a core on v4, v5e and v5p (v4 and v5p
# have two cores to a device); v6e and TPU7x do 4·256² products a cycle, which their peak and the compiler's estimates
# agree on. HBM: as libtpu 0.0.42 reports it.
CHIPS = {
    "v4": Chip(30.75 * GiB, 1228e9, 50e9, 3.125e9, 262_144, 128, 4),
    "v5e": Chip(15.75 * GiB, 819e9, 50e9, 3.125e9, 131_072, 128, 16),
    "v5p": Chip(95.74 * GiB, 2765e9, 100e9, 6.25e9, 262_144, 128, 4),
    "v6e": Chip(31.25 * GiB, 1638e9, 100e9, 12.5e9, 524_288, 256, 16),
    "tpu7x": Chip(94.75 * GiB, 3690e9, 100e9, 6.25e9, 524_288, 256, 4),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of one kind. `shape` is a slice's torus in chips."""

    name: str
    generation: str
    shape: tuple[int, ...]
    num_slices: int
    devices: tuple[Any, ...]

    @property
    def chip(self) -> Chip:
        return CHIPS[self.generation]


def parse_topology(text: str, slices: int = 1) -> tuple[str, tuple[int, ...], int]:
    """The generation, the shape and the number of slices that a name stands for.

    Raises:
        UserError: with examples of names.
    """
    match = re.fullmatch(r"(?:(\d+)\s*x\s+)?(\w+):(\d+(?:x\d+)*)", text.strip())
    if not match:
        raise UserError(f"--topology={text} is not GENERATION:SHAPE; examples: {EXAMPLES}")
    generation, shape = match[2], tuple(map(int, match[3].split("x")))
    if generation not in CHIPS:
        raise UserError(f"--topology={text}: {generation} is none of {', '.join(CHIPS)}; examples: {EXAMPLES}")
    if match[1] and slices > 1:
        raise UserError(f"--topology={text} and --slices={slices} both give a number of slices; leave one out")
    count = int(match[1] or slices)
    if count < 1 or math.prod(shape) < 1:
        raise UserError(f"--topology={text} with {count} slice(s) has no chips; examples: {EXAMPLES}")
    return generation, shape, count


def open_topology(text: str, slices: int = 1) -> Topology:
    """The devices to compile for.

    Raises:
        UserError: the name stands for nothing that exists, or the compiler is not installed.
    """
    generation, shape, count = parse_topology(text, slices)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("TPU topologies need XLA's compiler for TPUs, libtpu: pip install 'mlm-jax[tpu-compile]'")
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if "TPU" in name})
    import jax
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": count} if count > 1 else {}
    if generation == "v4":
        options["chip_config_name"] = "megacore"  # the two cores of a chip are one device, as on a real host
    if math.prod(shape) < 4 or shape in ((1, 4), (4, 1)):
        options["chips_per_host_bounds"] = [*shape, *[1] * (3 - len(shape))]
    name = f"{generation}:{'x'.join(map(str, shape))}"
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology={text}: {str(error).splitlines()[0][:200]}; examples: {EXAMPLES}") from error
    return Topology(name if count == 1 else f"{count}x {name}", generation, shape, count, tuple(devices))
